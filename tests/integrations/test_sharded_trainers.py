"""The Trainer and accelerate's own loop under FSDP2, in two processes, against DDP."""

import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).parents[1]
STEPS = 8


def _let_fsdp_run_on_cpus():
    """Let accelerate shard on CPUs: it has DDP alone there. All else of its FSDP2 is its own."""
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType

    make = AcceleratorState.__init__

    def init(self, *args, fsdp_plugin=None, **kwargs):
        make(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin

    AcceleratorState.__init__ = init


def _adapted():
    import models

    import lrkit

    model = models.make("bert", seed=3).double().eval()
    return model, lrkit.attach(model, lrkit.methods.adalora(rank=4, target_rank=2, warmup=1, final=2, interval=1))


def _found(adapted):
    from lrkit.shards import is_sharded

    history = [(d.step, d.budget, d.kept, d.lost) for d in adapted.history]
    sharded = any(map(is_sharded, adapted.parameters()))
    return {"tensors": adapted.state_dict()["tensors"], "history": history, "sharded": sharded}


def _trainer(folder, *, sharded, resume=None):
    import models
    from transformers import Trainer, TrainingArguments

    from lrkit.trainer import AdaptCallback

    config = {
        "version": 2,
        "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "transformer_layer_cls_to_wrap": ["BertLayer"],
        "state_dict_type": "SHARDED_STATE_DICT",
    }
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=3,
        gradient_accumulation_steps=2,
        max_grad_norm=0.5,
        learning_rate=1e-2,
        save_steps=STEPS // 2,
        logging_steps=1,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        **({"fsdp": True, "fsdp_config": config} if sharded else {}),
    )
    rows = [{k: v[0] for k, v in models.batch(seed=s, rows=1).items()} for s in range(96)]
    model, adapted = _adapted()
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[AdaptCallback(adapted, resume)])
    trainer.train(resume_from_checkpoint=resume)
    penalties = [log["penalty"] for log in trainer.state.log_history if "penalty" in log]
    return _found(adapted) | {"penalties": penalties}


def _loop(folder, *, sharded):
    import models
    from accelerate import Accelerator, FullyShardedDataParallelPlugin

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["BertLayer"],
        cpu_ram_efficient_loading=False,
    )
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin if sharded else None)
    model, adapted = _adapted()
    optimizer = torch.optim.AdamW(adapted.parameters(), lr=1e-2)
    model, optimizer = accelerator.prepare(model, optimizer)
    adapted.bind(optimizer, total_steps=STEPS)
    for step in range(STEPS):
        batch = models.batch(seed=step, rows=12)
        mine = {k: v[accelerator.process_index :: 2] for k, v in batch.items()}
        accelerator.backward(model(**mine).loss + adapted.penalty())
        accelerator.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    return _found(adapted)


RUNS = {
    "trainer, DDP": lambda folder: _trainer(folder / "ddp", sharded=False),
    "trainer, FSDP2": lambda folder: _trainer(folder / "fsdp", sharded=True),
    "trainer, resumed": lambda folder: _trainer(
        folder / "again", sharded=True, resume=str(folder / "fsdp" / f"checkpoint-{STEPS // 2}")
    ),
    "loop, DDP": lambda folder: _loop(folder, sharded=False),
    "loop, FSDP2": lambda folder: _loop(folder, sharded=True),
}


def _work(rank, name, folder, port):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    torch.set_num_threads(1)
    _let_fsdp_run_on_cpus()
    torch.save(RUNS[name](folder), folder / f"{name}-{rank}.pt")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each run has found, by its name and process."""
    folder = tmp_path_factory.mktemp("trainers")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-P", __file__, str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    return {name: [torch.load(folder / f"{name}-{rank}.pt") for rank in range(2)] for name in RUNS}


@pytest.mark.parametrize(
    ("sharded", "plain"),
    [
        ("trainer, FSDP2", "trainer, DDP"),
        ("trainer, resumed", "trainer, FSDP2"),
        ("loop, FSDP2", "loop, DDP"),
    ],
)
def test_fsdp2_of_accelerate_equals_ddp(sharded, plain, found):
    """Sharded by accelerate, AdaLoRA ends where it ends under DDP: the same decisions, penalties and weights."""
    expected = found[plain][0]
    for result in found[sharded]:
        assert result["sharded"]
        assert len(result["history"]) >= 4
        assert result["history"] == expected["history"]
        if "penalties" in expected:
            assert result["penalties"] == pytest.approx(expected["penalties"], rel=1e-12)
        for name, value in expected["tensors"].items():
            torch.testing.assert_close(
                result["tensors"][name], value, rtol=1e-5, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}"
            )


if __name__ == "__main__":
    import accelerate  # noqa: F401 - imported once, before the processes are forked
    import transformers  # noqa: F401

    import lrkit.trainer  # noqa: F401

    fork = multiprocessing.get_context("fork")
    for number, name in enumerate(RUNS):
        port = 29600 + (os.getpid() + number) % 300
        running = [fork.Process(target=_work, args=(rank, name, Path(sys.argv[1]), port)) for rank in range(2)]
        for process in running:
            process.start()
        for process in running:
            process.join()
        if any(process.exitcode for process in running):
            sys.exit(f"{name} failed")
