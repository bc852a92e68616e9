"""TRL's real DPOTrainer with the adapted model's own base as reference."""

import models  # noqa: F401  (the tests' folder is on the path)
import pytest
import torch
import zoo

import lrkit

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")


def tokenizer():
    from lrkit.study.pretrained import load_model
    from lrkit.tasks import Head

    _, found = load_model("minilm", Head(num_labels=2, problem_type="single_label_classification"))
    return found


@pytest.mark.filterwarnings("ignore")
def test_the_reference_is_the_base(tmp_path):
    """Log-probabilities under ref_model=adapted.reference() are the base's at every step, and DPO trains the adapters."""
    import transformers

    words = tokenizer()
    words.eos_token = "[SEP]"
    torch.manual_seed(0)
    config = zoo.make("llama-lm").config
    config.vocab_size = len(words)
    config.pad_token_id = words.pad_token_id
    model = transformers.LlamaForCausalLM(config).eval()
    ids = torch.randint(3, 1000, (2, 8))
    with torch.no_grad():
        before = model(input_ids=ids).logits
    adapted = lrkit.attach(model, lrkit.methods.adalora(rank=4, target_rank=2))
    reference = adapted.reference()
    seen = []

    class Look(transformers.TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            seen.append(torch.equal(reference(input_ids=ids).logits, before))

    rows = [{"prompt": "a good", "chosen": " film indeed", "rejected": " waste of time"}] * 16
    trainer = trl.DPOTrainer(
        model=model,
        ref_model=reference,
        args=trl.DPOConfig(
            str(tmp_path),
            max_steps=6,
            per_device_train_batch_size=2,
            learning_rate=1e-2,
            report_to=[],
            save_strategy="no",
            logging_steps=1,
            use_cpu=True,
            bf16=False,
        ),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=words,
        callbacks=[lrkit.trainer.AdaptCallback(adapted), Look()],
    )
    trainer.train()
    assert adapted.step == len(seen) == 6 and all(seen)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(0.6931, abs=1e-3)  # the policy is the reference at first
    assert losses[-1] < losses[0]
    with torch.no_grad():
        assert torch.equal(reference(input_ids=ids).logits, before)
        assert not torch.equal(model.eval()(input_ids=ids).logits, before)
