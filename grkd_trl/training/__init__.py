"""What every trainer of groups does alike, as functions: the objective is the trainer's own, the bookkeeping is here."""

from ..data.sampler import BalancedSampler, OrderOfEpoch, RepeatedPrompts, balanced_sampler, places_of_process
from ..trainers.base import (
    count_batch_samples,
    create_model_card,
    evaluation_loop,
    log,
    number_rows,
    prediction_step,
    prepare_dataset,
    set_signature_columns,
)
from ..trainers.checkpoints import train
from ..trainers.setup import (
    check_teacher,
    resolve_args,
    set_up_groups,
    set_up_teacher,
)
from ..trainers.step import (
    add_group_metrics,
    add_router_loss,
    num_without_repeats,
    rows_without_repeats,
    set_remainder,
    step_counts,
    step_generator,
    step_means,
    teaching,
    without_repeats,
)


__all__ = [
    "BalancedSampler",
    "OrderOfEpoch",
    "RepeatedPrompts",
    "add_group_metrics",
    "add_router_loss",
    "balanced_sampler",
    "check_teacher",
    "count_batch_samples",
    "create_model_card",
    "evaluation_loop",
    "log",
    "num_without_repeats",
    "number_rows",
    "places_of_process",
    "prediction_step",
    "prepare_dataset",
    "resolve_args",
    "rows_without_repeats",
    "set_remainder",
    "set_signature_columns",
    "set_up_groups",
    "set_up_teacher",
    "step_counts",
    "step_generator",
    "step_means",
    "teaching",
    "train",
    "without_repeats",
]
