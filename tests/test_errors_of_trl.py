"""Errors that are TRL's own."""

import pytest
from datasets import Dataset
from good_input import make_trainer
from peft import LoraConfig, get_peft_model
from tiny import tiny_model
from transformers import BitsAndBytesConfig
from trl import DPOConfig, DPOTrainer


def error_of(make, **kwargs):
    with pytest.raises((ValueError, TypeError)) as caught:
        make(**kwargs)
    return type(caught.value), str(caught.value)


class TestErrorsOfTRL:
    """Misuse that TRL knows about gets the words TRL has for it."""

    @pytest.fixture
    def both(self, tmp_path, tokenizer):
        def both(config=None, **kwargs):
            def dpo(**kwargs):
                pairs = Dataset.from_list([{"prompt": "a b ", "chosen": "c", "rejected": "d"}] * 4)
                settings = {"bf16": False, "use_cpu": True, "report_to": "none", "gradient_checkpointing": False}
                args = DPOConfig(tmp_path / "out", **settings | (config or {}))
                arguments = {"model": tiny_model("llama", len(tokenizer)), "processing_class": tokenizer}
                return DPOTrainer(args=args, train_dataset=pairs, **arguments | kwargs)

            def grkd(**kwargs):
                return make_trainer(tmp_path, tokenizer, config=config, **kwargs)

            return error_of(dpo, **kwargs), error_of(grkd, **kwargs)

        return both

    def test_peft_config_of_another_type(self, both):
        theirs, ours = both(peft_config={"r": 4})
        assert ours == theirs
        assert ours[0] is TypeError and "peft.PeftConfig" in ours[1]

    def test_peft_config_for_a_peft_model(self, both, tokenizer):
        model = get_peft_model(tiny_model("llama", len(tokenizer)), LoraConfig(task_type="CAUSAL_LM"))
        theirs, ours = both(model=model, peft_config=LoraConfig(task_type="CAUSAL_LM"))
        assert ours[0] is theirs[0]  # in words of our own: adapters of a path are refused with them too, and earlier
        assert "merge" in ours[1] and "merge" in theirs[1]

    def test_quantization_set_twice(self, both, tokenizer, tmp_path_factory):
        folder = str(tmp_path_factory.mktemp("student"))
        tiny_model("llama", len(tokenizer)).save_pretrained(folder)
        quantization = BitsAndBytesConfig(load_in_8bit=True)
        theirs, ours = both(
            model=folder,
            quantization_config=quantization,
            config={"model_init_kwargs": {"quantization_config": quantization}},
        )
        assert ours == theirs
        assert "only one place" in ours[1]

    def test_processing_class_of_another_type(self, both):
        theirs, ours = both(processing_class="tokenizer")
        assert ours == theirs
