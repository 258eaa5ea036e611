"""Errors that are TRL's own, and versions of TRL that are refused."""

import subprocess
import sys
from pathlib import Path

import pytest
from datasets import Dataset
from good_input import make_trainer
from peft import LoraConfig, get_peft_model
from tiny import tiny_model
from transformers import BitsAndBytesConfig
from trl import DPOConfig, DPOTrainer

from grkd_trl._trl import SUPPORTED_TRL, check_trl_version


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
        assert ours == theirs
        assert "merge" in ours[1]

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

    def test_adapter_on_the_head(self, both):
        theirs, ours = both(peft_config=LoraConfig(target_modules=["lm_head"], task_type="CAUSAL_LM"))
        assert ours == theirs
        assert "`lm_head`" in ours[1]

    def test_processing_class_of_another_type(self, both):
        theirs, ours = both(processing_class="tokenizer")
        assert ours == theirs


class TestVersion:
    @pytest.mark.parametrize("installed", ["1.15.0", "2.0.0", "0.24.0", "1.17.0", "1.17.1"])
    def test_outside_the_range(self, installed):
        with pytest.raises(ImportError) as caught:
            check_trl_version(installed)
        message = str(caught.value)
        assert f"trl {installed}" in message and f"trl{SUPPORTED_TRL}" in message
        assert "private" in message or "may change" in message
        assert f'pip install "trl{SUPPORTED_TRL}"' in message

    @pytest.mark.parametrize("installed", ["1.16.0", "1.16.3", "1.16.1.dev0"])
    def test_inside_the_range(self, installed):
        check_trl_version(installed)

    def test_import(self):
        """The package asks before it imports anything of TRL, which might fail in a way that says nothing."""
        code = (
            "import importlib.metadata as metadata, sys\n"
            "version = metadata.version\n"
            "metadata.version = lambda name: '1.15.0' if name == 'trl' else version(name)\n"
            "try:\n"
            "    import grkd_trl\n"
            "finally:\n"
            "    print('trl' in sys.modules)\n"
        )
        root = Path(__file__).resolve().parents[1]
        result = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=120)
        assert result.returncode == 1
        assert "ImportError: grkd_trl supports trl" in result.stderr and "trl 1.15.0 is installed" in result.stderr
        assert result.stdout.strip() == "False"
