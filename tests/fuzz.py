"""Bad input by the thousand: `make fuzz`, or `python tests/fuzz.py --cases 4000 --seed 0`.

Every case is a function of the seed and its number alone, and so is told by them. A case fails where lrkit

- ends with anything but `LrkitError`, or exit code 0 or 2 on the command line;
- takes what the generator knows to be wrong;
- takes more than `SECONDS`, or more memory than `ROOM`;
- says more than `LINE` characters, or several lines;
- leaves a model or a running method other than it was after it has refused.

All cases run in one process, under an alarm and a bound on its address space.
"""

import argparse
import collections
import contextlib
import copy
import gzip
import io
import json
import os
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
sys.path.insert(0, str(Path(__file__).parent))

import folders
import models
import torch
from safetensors.torch import save_file

import lrkit
from lrkit.adapt import checkpoint

SECONDS = 20
LINE = 1000
ROOM = 6 << 30


class Hung(BaseException):
    """Raised by the alarm."""


class Fault(Exception):
    """What a case found."""


# ---- odd values ------------------------------------------------------------------------------------------------------


def deep(depth, inner=0):
    for _ in range(depth):
        inner = [inner]
    return inner


def odd(rng):
    """A value that hardly anything should be."""
    return rng.choice(
        [
            *(
                None,
                True,
                False,
                -1,
                0,
                1,
                2,
                3,
                7,
                2**31,
                2**53,
                2**62,
                2**63,
                2**63 - 1,
                2**64,
                10**15,
                10**400,
                -(10**30),
            ),
            *(
                0.5,
                -0.0,
                1e308,
                float("nan"),
                float("inf"),
                -float("inf"),
                1.5,
                "",
                "x",
                "\0",
                "\u00b2",
                "é",
                "../../etc",
            ),
            *(
                "a" * 100_000,
                "9" * 5000,
                "None",
                "1e9",
                [],
                [None],
                [[]],
                ["x"] * 3,
                [0, 1, 2],
                [-1],
                [2**63],
                {},
                {"": 0},
            ),
            *(
                {"name": 5},
                {"name": "x"},
                {"x": {"y": {}}},
                list(range(5000)),
                deep(100),
                deep(900),
                "\ud800",
                b"".decode(),
            ),
        ]
    )


def places(value, path=()):
    """Every place in plain data."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value[:3]) if isinstance(value, list) else ()
    for key, item in items:
        yield from places(item, (*path, key))


def mutated(rng, value, times=1):
    """Plain data with something else somewhere."""
    value = copy.deepcopy(value)
    for _ in range(times):
        found = [path for path in places(value) if path]
        if not found:
            return odd(rng)
        # The top is as likely as all that is below it.
        path = rng.choice([p for p in found if len(p) == 1] if rng.random() < 0.4 else found)
        node = value
        for key in path[:-1]:
            node = node[key]
        old = node[path[-1]]
        what = rng.random()
        if what < 0.5:
            node[path[-1]] = odd(rng)
        elif what < 0.6:
            del node[path[-1]]
        elif what < 0.7 and isinstance(node, dict):
            node[rng.choice(["extra", "", "a" * 5000, "name", "also", "__class__"])] = odd(rng)
        elif isinstance(old, bool):
            node[path[-1]] = not old
        elif isinstance(old, int):
            node[path[-1]] = old + rng.choice([-1, 1, 10, -old, 10**6, 2**31, 2**62, 2**63])
        elif isinstance(old, float):
            node[path[-1]] = old * rng.choice([-1, 1e30, 0, float("nan")])
        elif isinstance(old, str):
            node[path[-1]] = rng.choice([old + "x", old[1:], old * 1000, old.upper(), ""])
        elif isinstance(old, list):
            node[path[-1]] = rng.choice([old[::-1], old[1:], [*old, *old], [*old, odd(rng)]])
        else:
            node[path[-1]] = odd(rng)
    return value


def as_json(value):
    return json.dumps(value, default=str)


# ---- running ---------------------------------------------------------------------------------------------------------


def one_line(text, what):
    if len(text) > LINE:
        raise Fault(f"{what} says {len(text):,} characters")
    if "\n" in text.strip():
        raise Fault(f"{what} says several lines: {text[:200]!r}")


def refused(call):
    """Whether a call was refused as it should be."""
    try:
        call()
    except lrkit.LrkitError as error:
        one_line(str(error), "the error")
        return True
    return False


def cli(*arguments):
    """Exit code of a command in this process; its errors must be single lines."""
    from lrkit.cli import main

    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main([str(argument) for argument in arguments])
    except SystemExit as end:
        code = end.code
    for line in err.getvalue().splitlines():
        one_line(line, "the command")
    if code not in (0, 2):
        raise Fault(f"exit code {code}: {err.getvalue()[-200:]}")
    if code == 2 and not err.getvalue().strip():
        raise Fault("exit code 2 without a word")
    if "out of memory" in err.getvalue():
        raise Fault(f"out of memory: {err.getvalue()[-200:]}")
    return code


METHODS = {
    "lora": lambda: lrkit.methods.lora(rank=4),
    "adalora": lambda: lrkit.methods.adalora(rank=4, target_rank=2, warmup=2, final=4, interval=1),
    "aflora": lambda: lrkit.methods.aflora(rank=4, warmup=2, final=4),
    "elora": lambda: lrkit.methods.elora(rank=4),
}
TOTAL = 14


def start(name):
    model = models.make("bert", seed=3).eval()
    adapted = lrkit.attach(model, METHODS[name]())
    optimizer = torch.optim.AdamW(adapted.parameters(), lr=1e-2)
    adapted.bind(optimizer, total_steps=TOTAL)
    return model, adapted, optimizer


def steps(model, adapted, optimizer, begin, end):
    for step in range(begin, end):
        (model(**models.batch(seed=step, rows=4, length=6)).loss + adapted.penalty()).backward()
        optimizer.step()
        optimizer.zero_grad()


class World:
    """What cases start from, made once."""

    def __init__(self, folder):
        self.folder = folder
        self.number = 0
        self.states, self.runs = {}, {}
        for name in METHODS:
            model, adapted, optimizer = start(name)
            steps(model, adapted, optimizer, 0, 5)
            found = [adapted.state_dict()]
            steps(model, adapted, optimizer, 5, 8)
            found.append(adapted.state_dict())
            steps(model, adapted, optimizer, 8, TOTAL)
            found.append(adapted.state_dict())
            with contextlib.suppress(lrkit.LrkitError):
                adapted.compact()
                found.append(adapted.state_dict())
            self.states[name] = found
            model, adapted, optimizer = start(name)
            steps(model, adapted, optimizer, 0, 3)
            self.runs[name] = model, adapted, optimizer, self.look(model, adapted, optimizer)
        self.model = folders.write_model(folder / "model")
        self.data = folders.write_data(folder / "data")
        self.peft = {}
        for name, to in (("lora", "peft-lora"), ("adalora", "peft-adalora")):
            model = models.make("bert", seed=3).eval()
            adapted = lrkit.attach(model, METHODS[name]())
            for p in adapted.adapter_parameters():
                torch.nn.init.normal_(p, std=0.3)
            self.peft[name] = folder / to
            lrkit.export(adapted, self.peft[name], to=to)
        self.plain = models.make("bert", seed=3).eval()
        self.names = [n for n, _ in self.plain.named_modules()]
        self.weights = {n: p.clone() for n, p in self.plain.named_parameters()}
        self.study = self._study()

    def _study(self):
        out = self.folder / "study"
        lrkit.ablate(
            "adalora",
            {"metric": ["magnitude"]},
            out=out,
            task={"data": str(self.data)},
            model=str(self.model),
            seeds=1,
            set={"rank": 2, "target_rank": 1},
            run={"steps": 3, "batch_size": 4, "max_length": 8},
            workers=0,
            costs=False,
        )
        return out

    def fresh(self):
        """A new folder."""
        self.number += 1
        return self.folder / f"case-{self.number}"

    @staticmethod
    def look(model, adapted, optimizer):
        """All that a refused state must leave as it is."""
        state = adapted.state_dict()
        moments = [{k: v.clone() for k, v in s.items()} for s in optimizer.state.values()]
        return state, moments, [p.requires_grad for p in model.parameters()], adapted.total_steps

    def unchanged(self, name):
        model, adapted, optimizer, before = self.runs[name]
        now = self.look(model, adapted, optimizer)
        same = before[0]["meta"] == now[0]["meta"] and before[0]["tensors"].keys() == now[0]["tensors"].keys()
        same = same and all(torch.equal(t, now[0]["tensors"][n]) for n, t in before[0]["tensors"].items())
        same = same and len(before[1]) == len(now[1]) and before[2:] == now[2:]
        same = same and all(torch.equal(v, b[k]) for a, b in zip(before[1], now[1], strict=True) for k, v in a.items())
        if not same:
            self.again(name)
            raise Fault("refused, and the run is not what it was")

    def again(self, name):
        """A run that took a state is made anew."""
        model, adapted, optimizer = start(name)
        steps(model, adapted, optimizer, 0, 3)
        self.runs[name] = model, adapted, optimizer, self.look(model, adapted, optimizer)

    def plain_again(self):
        """The plain model must be as it was."""
        same = [n for n, _ in self.plain.named_modules()] == self.names
        same = same and all(torch.equal(p, self.weights[n]) for n, p in self.plain.named_parameters())
        same = same and not any("forward" in vars(m) for m in self.plain.modules())
        if not same:
            self.plain = models.make("bert", seed=3).eval()
            raise Fault("refused, and the model is not what it was")


# ---- kinds -----------------------------------------------------------------------------------------------------------


def states(rng, world):
    """A state whose data or tensors are not what they were, into a run and into a plain model."""
    name = rng.choice(list(METHODS))
    good = rng.choice(world.states[name])
    meta, tensors = copy.deepcopy(good["meta"]), dict(good["tensors"])
    wrong, told = False, ""  # whether it is known to be, and how
    which = rng.random()
    layer = rng.choice(list(meta["ranks"]))
    if which < 0.4:
        meta = mutated(rng, meta, rng.choice([1, 1, 2]))
    elif which < 0.65:
        wrong = True
        disagreements = {
            "step": lambda: meta.update(step=rng.choice([10**6, 10**15, TOTAL * 50])),
            "head": lambda: meta.update(
                head=rng.choice([[], ["../../etc"], [""], ["bert"], [*meta["head"], "bert.encoder"], ["bert.pooler"]])
            ),
            "rank": lambda: meta["ranks"].update({layer: meta["ranks"][layer] + rng.choice([1, 10**5, 2**62])}),
            "numbered": lambda: meta["numbered"].update({layer: rng.choice([0, 1, 65536, 2**62])}),
            "components": lambda: meta["components"].update({layer: [10**6 + i for i in range(meta["ranks"][layer])]}),
            "sums": lambda: meta["sums"].update({layer: rng.choice([2**63, 2**62, 10**12])}),
            "total": lambda: meta.update(total_steps=rng.choice([TOTAL + 1, 10**9, 10**15, 2**63])),
            "history": lambda: meta["history"].append(
                {
                    "step": rng.choice([0, 10**9]),
                    "policy": rng.choice([0, 9]),
                    "budget": 1,
                    "kept": 1,
                    "units": 1,
                    "threshold": 0.5,
                    "lost": [],
                    "returned": [],
                    "fresh": [],
                }
            ),
            "targets": lambda: meta.update(targets=meta["targets"] * 2),
            "seed": lambda: meta.update(seed=rng.choice([2**63, -1, 0.5])),
            "format": lambda: meta.update(format=rng.choice([0, 2, True, "1", 1.0])),
            "method": lambda: meta["method"]["parameterization"].update(rank=rng.choice([5, 65536, 1, "4"])),
        }
        told = rng.choice(list(disagreements))
        disagreements[told]()
        wrong = meta != good["meta"]
    else:
        key = rng.choice(list(tensors))
        old = tensors[key]
        wrong = True
        told = change = rng.choice(["drop", "shape", "dtype", "empty", "huge", "extra", "transpose"])
        if change == "drop":
            del tensors[key]
        elif change == "shape":
            tensors[key] = (
                torch.zeros([*old.shape, 2]) if rng.random() < 0.5 else torch.zeros((*(n + 1 for n in old.shape),))
            )
        elif change == "dtype":
            other = [d for d in (torch.float64, torch.int8, torch.bool, torch.float16) if d != old.dtype]
            tensors[key] = old.to(rng.choice(other))
            # Weights of another precision are taken in it, and said.
            wrong = not (key.startswith("weight.") and old.is_floating_point() and tensors[key].is_floating_point())
        elif change == "empty":
            wrong, tensors[key] = bool(old.numel()), torch.zeros(0)
        elif change == "huge":
            wrong, tensors[key] = False, old * 1e30 if old.is_floating_point() else old
        elif change == "extra":
            tensors[rng.choice(["weight.x", "policy.9.kept", "x", "a" * 5000, "policy.0.kept.x"])] = torch.zeros(2)
        else:
            wrong = old.ndim == 2 and old.shape[0] != old.shape[1]
            tensors[key] = old.t().contiguous() if old.ndim == 2 else old
    state = {"meta": meta, "tensors": tensors}
    if rng.random() < 0.6:
        _, adapted, _, _ = world.runs[name]
        if refused(lambda: adapted.load_state_dict(state)):
            world.unchanged(name)
        elif wrong:
            world.again(name)
            raise Fault("a state that does not fit was taken by load_state_dict")
        else:
            world.again(name)
        return
    if any(name_ == "a" * 5000 for name_ in tensors):
        return
    folder = world.fresh()
    folder.mkdir()
    save_file(tensors, folder / checkpoint.FILE, metadata={"lrkit": as_json(meta)})
    loaded(world, folder, told != "total" and wrong and (told or True))  # a run of another length, before it is bound


def loaded(world, folder, wrong):
    """Load a folder into the plain model, which must be as it was where it is refused."""
    took = []
    if not refused(lambda: took.append(lrkit.load(world.plain, folder))):
        took[0].detach()
        if wrong:
            raise Fault(f"a state that does not fit was taken by load ({wrong})")
    world.plain_again()


def headers(rng, world):
    """A file whose bytes are not a state's."""
    folder = world.fresh()
    folder.mkdir()
    path = folder / checkpoint.FILE
    name = rng.choice(list(METHODS))
    state = world.states[name][0]
    save_file(state["tensors"], path, metadata={"lrkit": json.dumps(state["meta"])})
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header, body = data[8 : 8 + size], data[8 + size :]

    def put(text):
        text += b" " * (-len(text) % 8)
        path.write_bytes(struct.pack("<Q", len(text)) + text + body)

    def place(change):
        told = json.loads(header)
        key = rng.choice([k for k in told if k != "__metadata__"])
        change(told, key)
        put(json.dumps(told).encode())

    wrong = True
    kind = rng.randrange(14)
    if kind == 0:
        path.write_bytes(data[: rng.randrange(len(data))])
    elif kind == 1:
        path.write_bytes(struct.pack("<Q", rng.choice([0, 2**63, 2**64 - 1, size + 10**9, size - 1])) + data[8:])
    elif kind == 2:
        put(
            rng.choice(
                [b"[" * 100_000, b'{"a":' * 50_000, b"{}", b"[]", b"5", b"null", b"\xff\xfe", b'{"__metadata__": 5}']
            )
        )
    elif kind == 3:
        text = rng.choice(
            ["[" * 100_000, '{"format": ' + "9" * 5000 + "}", "", "5", "null", "[]", '{"a":' * 100_000, "\ud800"]
        )
        told = json.loads(header)
        told["__metadata__"]["lrkit"] = text
        put(json.dumps(told).encode())
    elif kind == 4:
        place(
            lambda told, key: told[key].update(shape=rng.choice([[2**40], [-1], [2**62, 2**62], "x", [0.5], [], None]))
        )
    elif kind == 5:
        place(
            lambda told, key: told[key].update(
                data_offsets=rng.choice([[0, 2**62], [8, 0], [-8, 0], [0], "x", None, [1e9, 2]])
            )
        )
    elif kind == 6:
        place(lambda told, key: told[key].update(dtype=rng.choice(["F4", "Q8", 5, None, ["F32"], "F64"])))
    elif kind == 7:
        wrong = False  # a flipped bit may be one of a weight
        place_ = rng.randrange(len(data))
        path.write_bytes(data[:place_] + bytes([data[place_] ^ (1 << rng.randrange(8))]) + data[place_ + 1 :])
    elif kind == 8:
        path.write_bytes(data + b"x" * rng.choice([1, 8, 1000]))
    elif kind == 9:
        path.unlink()
        special(rng, path)
    elif kind == 10:
        place(lambda told, key: told.pop(key))
    elif kind == 11:
        place(lambda told, key: told.update({key + "x": told[key]}))
    elif kind == 12:
        put(as_json(mutated(rng, json.loads(header))).encode())
        wrong = False
    else:
        path.write_bytes(rng.randbytes(rng.choice([0, 1, 7, 8, 9, 1000])))
    if kind in (9, 13) and rng.random() < 0.3:
        if cli("export", folder, "--to", "merged", "--out", world.fresh()) != 2:
            raise Fault("a file that is no state was exported")
        return
    loaded(world, folder, wrong)


def special(rng, path):
    """Something at a path that is no regular file, or none that ends."""
    kind = rng.randrange(9)
    if kind == 0:
        os.mkfifo(path)
    elif kind == 1:
        path.symlink_to(path)
    elif kind == 2:
        path.symlink_to("/dev/zero")
    elif kind == 3:
        path.symlink_to(
            rng.choice(["/proc/self/mem", "/proc/self/maps", "/proc/self/pagemap", "/proc/kmsg", "/proc/self/environ"])
        )
    elif kind == 4:
        path.mkdir()
    elif kind == 5:
        path.symlink_to("nothing-there")
    elif kind == 6:
        other = path.with_name(f"{path.name}.other")
        other.symlink_to(path)
        path.symlink_to(other)
    elif kind == 7:
        with path.open("wb") as file:  # a hole: long, and nothing in it
            file.truncate(10**11)
    else:
        path.symlink_to("/dev/stdin" if rng.random() < 0.3 else "/dev/full")


def bases(rng, world):
    """A run's folder whose base model cannot be."""
    folder = world.fresh()
    folder.mkdir()
    state = world.states["lora"][0]
    base = state["meta"]["base"]
    bad = rng.choice(
        [
            *(
                odd(rng),
                {},
                [],
                {**base, "class": rng.choice(["pipeline", "Trainer", "AutoModel", "os", "", "é", 5, "BertConfig"])},
            ),
            *({**base, "name": rng.choice([5, "/tmp", "/dev/null", "\0", "a" * 5000, "../..", "x/y/z", ""])},),
            *({**base, "dtype": rng.choice(["load", "int8", "float99", 5, "nn", "__name__"])},),
            {**base, "config": mutated(rng, base["config"], 2)},
            {**base, "config": {**base["config"], "num_hidden_layers": rng.choice([10**9, -5, "x", 10**12])}},
            {**base, "config": {**base["config"], "hidden_size": rng.choice([10**9, 0, -5, "x", 31])}},
        ]
    )
    save_file(state["tensors"], folder / checkpoint.FILE, metadata={"lrkit": as_json({**state["meta"], "base": bad})})
    if rng.random() < 0.3:
        (folder / "result.json").write_text(
            rng.choice(["[" * 100_000, '{"model": 5}', "{}", "\0", '{"model": "/dev/null"}'])
        )
    out = world.fresh()
    more = ["--model", world.model] if rng.random() < 0.5 else []
    if cli("export", folder, "--to", rng.choice(["merged", "peft-lora"]), "--out", out, *more) != 2:
        raise Fault("a run without its base was exported")
    if out.exists():
        raise Fault("refused, and something is written")


PATTERNS = [
    "([a-z.0-9]+)+!",
    "(?i)query",
    "(a|a)*b",
    "[",
    "(",
    "a{99999999999}",
    "(.*)*x",
    "(?P<n>.*)(?P=n)+",
    "\\",
    "a" * 10_000,
]
PATTERNS += [
    "(" * 500,
    "(x+x+)+y",
    "(.?){500}z",
    "(?:(?:a+)+)+$",
    "a?" * 40 + "a" * 40,
    ".*" * 12 + "!",
    "(?x)(a +) +!",
    "((a*)*)*",
]


def peft(rng, world):
    """A folder of PEFT's that is not what it should be."""
    name = rng.choice(list(world.peft))
    folder = world.fresh()
    shutil.copytree(world.peft[name], folder)
    config, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    plain = json.loads(config.read_text())
    wrong = True
    kind = rng.randrange(9)
    if kind == 0:
        config.write_text(as_json(mutated(rng, plain, rng.choice([1, 2]))))
        wrong = False
    elif kind == 1:
        pattern = rng.choice(PATTERNS)
        config.write_text(json.dumps({**plain, "alpha_pattern": {pattern: 8}}))
        wrong = False
    elif kind == 2:
        config.write_text(
            rng.choice(["[" * 100_000, "", "5", "[]", "null", '{"peft_type":' + "9" * 5000 + "}", "{" * 100_000])
        )
    elif kind == 3:
        file = rng.choice([config, weights])
        file.unlink()
        special(rng, file)
    elif kind == 4:
        key = rng.choice(["lora_alpha", "r", "init_r", "target_r", "tinit", "tfinal", "deltaT", "beta1", "total_step"])
        value = rng.choice([10**400, 10**9, -1, 0, 1e308, "x", None, True, [], 65536, 2**63])
        config.write_text(json.dumps({**plain, key: value}))
        wrong = False
    elif kind == 5:
        data = weights.read_bytes()
        weights.write_bytes(data[: rng.randrange(len(data))])
    elif kind == 6:
        with checkpoint.open_tensors(weights) as file:
            tensors = file.tensors()
        key = rng.choice([k for k in tensors if "lora_" in k])
        tensors[key] = rng.choice(
            [
                torch.zeros(0),
                tensors[key] * float("nan"),
                tensors[key].int(),
                tensors[key][:, :1].contiguous()[:1],
                tensors[key][None],
            ]
        )
        save_file(tensors, weights)
        wrong = False
    elif kind == 7:
        with checkpoint.open_tensors(weights) as file:
            tensors = file.tensors()
        key = rng.choice(list(tensors))
        value = tensors.pop(key)
        tensors[rng.choice([key + "x", key.replace("bert", "tree"), "x", "a" * 20_000 + ".lora_A.weight"])] = value
        save_file(tensors, weights)
    else:
        config.write_text(
            json.dumps(
                {
                    **plain,
                    rng.choice(["modules_to_save", "peft_type", "lora_dropout", "init_lora_weights"]): odd_json(rng),
                }
            )
        )
        wrong = False
    took = []
    if not refused(lambda: took.append(lrkit.from_peft(world.plain, folder))):
        took[0].detach()
        if wrong:
            raise Fault("a damaged adapter was taken")
    world.plain_again()


def odd_json(rng):
    return rng.choice(
        [None, True, 5, -1, 2.5, "x", [], ["x"], [5], {}, "a" * 10_000, ["../../etc"], deep(50), [""], {"a": 1}]
    )


SWAPS = [
    "metric",
    "scheduler",
    "action",
    "parameterization",
    "also",
    "also.0.metric",
    "also.\u00b2.metric",
    "also.9999",
    "",
    ".",
]
SWAPS += [
    "metric.beta1",
    "scheduler.target",
    "parameterization.rank",
    "rank",
    "target_rank",
    "x",
    "a" * 5000,
    "metric..",
    "action.ties",
]
SWAPS += [
    "scheduler.warmup",
    "scheduler.final",
    "scheduler.interval",
    "parameterization.alpha",
    "run.lr",
    "metric.name",
    "\u0661",
]
VALUES = [
    "magnitude",
    "1",
    "0",
    "-1",
    "2.5",
    "nan",
    "Infinity",
    "1e400",
    "9" * 5000,
    "10" + "0" * 400,
    "none",
    "true",
    "[" * 2000,
    "{}",
]
VALUES += [
    "[1,2]",
    '{"name": "magnitude"}',
    '{"name": 5}',
    "x" * 100_000,
    "2147483647",
    "2147483648",
    "65536",
    "65537",
    "\u00b2",
    "\0",
]
VALUES += ["0.0", "1.0", "4,5", ",", "1,,2", '"', "[[[[1]]]]" * 100, "9223372036854775808", "1e9", "-0.0", "\ud800"]


def arguments(rng, world):
    """Arguments of the command line, in orders and sizes that nobody means."""
    method = rng.choice(
        ["adalora", "lora", "aflora", "elora", "svd-lora", "full", "x", "", "a" * 10_000, "Adalora", "\u00b2"]
    )
    pair = lambda: f"{rng.choice(SWAPS)}={rng.choice(VALUES)}"  # noqa: E731
    more = [part for _ in range(rng.choice([0, 1, 1, 2])) for part in ("--set", pair())]
    more += [part for _ in range(rng.choice([0, 0, 1])) for part in ("--swap", pair())]
    kind = rng.randrange(7)
    if kind == 0:
        steps_ = rng.choice(["1", "10", "1000000000", "2147483647", "2147483648", "10" + "0" * 30, "-1", "x", "1e9"])
        cli("params", method, "--model", "minilm", "--steps", steps_, *more)
    elif kind == 1:
        targets = rng.choice([*PATTERNS, "", "query,value", ",", "x" * 5000, ".*", "bert", "\0", "classifier"])
        cli(
            "ablate",
            "lora",
            "--targets",
            targets,
            "--data",
            world.data,
            "--model",
            world.model,
            "--seeds",
            "1",
            "--dry-run",
            *more,
        )
    elif kind == 2:
        leave = rng.choice(["penalty", "policy", "also", "x", "", ",", "a" * 5000, "penalty,penalty", "\u00b2"])
        seeds = rng.choice(
            ["1", "0", "-1", "6", "1,1", "4294967296", "10001", "x", "", "1e3", "9" * 400, "1,2,x", "[1]"]
        )
        cli(
            "ablate",
            method,
            "--leave-out",
            leave,
            "--seeds",
            seeds,
            "--data",
            world.data,
            "--model",
            world.model,
            "--dry-run",
        )
    elif kind == 3:
        values = ",".join(str(n / 100) for n in range(1, rng.choice([3, 60, 90])))
        swaps = [p for k in ("metric.beta1", "metric.beta2", "orthogonality") for p in ("--swap", f"{k}={values}")]
        if (
            cli("ablate", "adalora", *swaps, "--grid", "--dry-run", "--data", world.data, "--model", world.model) == 0
            and values.count(",") > 40
        ):
            raise Fault("a grid without end was laid out")
    elif kind == 4:
        model = rng.choice(
            ["", "/", "/dev/null", "/tmp", "a" * 5000, "\0", "x/y", "../..", "deberta-v3-base", "\ud800", "minilm/"]
        )
        cli("params", "lora", "--model", model, "--steps", "10")
    elif kind == 5:
        key = rng.choice(
            [
                "steps",
                "epochs",
                "batch_size",
                "lr",
                "head_lr",
                "seed",
                "devices",
                "max_length",
                "threads",
                "x",
                "train_rows",
            ]
        )
        value = rng.choice([*VALUES, "0", "-5"])
        if value in ("1", "2147483647", "65536", "65537", "1.0", "2.5", "1e9"):  # it would train
            value = "-1"
        out = world.fresh()
        cli(
            "run",
            "lora",
            "--data",
            world.data,
            "--model",
            world.model,
            "--set",
            f"run.{key}={value}",
            "--set",
            "run.steps=0",
            "--out",
            out,
        )
    else:
        command = rng.choice(["run", "ablate", "params", "export", "report", "methods", "plugins", "x", ""])
        odd_ = [
            "--steps",
            "-h" * 300,
            "--json=1",
            "--out",
            "--",
            "-",
            "--model",
            "\0",
            "--seeds=9",
            "--workers=-1",
            "--threads=0",
            "--grid",
        ]
        cli(
            command,
            *(rng.choice(odd_) for _ in range(rng.randrange(4))),
            *(["--dry-run"] if command == "ablate" else []),
        )


STUDY = {
    "base": "adalora",
    "title": "t",
    "set": {"rank": 2, "target_rank": 1},
    "swap": {"metric": ["magnitude", "sensitivity"]},
    "leave_out": ["penalty"],
    "seeds": 2,
    "rows": [{"label": "x", "set": {"rank": 3}}, {"base": "lora"}],
    "run": {"steps": 3, "batch_size": 4, "max_length": 8},
}


def toml(value):
    """Plain data as TOML, as far as TOML has it; texts of what it has not."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(str(k))} = {toml(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(toml(v) for v in value) + "]"
    if isinstance(value, float):
        return {"nan": "nan", "inf": "inf", "-inf": "-inf"}.get(str(value), repr(float(value)))
    return '"none"' if value is None else json.dumps(value)


def studies(rng, world):
    """A study's file that is none, or asks for what there is not."""
    path = world.folder / f"study-{world.number}.toml"
    world.number += 1
    study = {**STUDY, "model": str(world.model), "tasks": [{"data": str(world.data)}]}
    kind = rng.randrange(8)
    wrong = False
    if kind < 5:
        plain = mutated(rng, study, rng.choice([1, 1, 2]))
        if not isinstance(plain, dict):
            plain = {"base": plain}
        with contextlib.suppress(RecursionError):
            text = "\n".join(f"{json.dumps(k)} = {toml(v)}" for k, v in plain.items())
            path.write_bytes(text.encode("utf-8", errors="surrogatepass"))
    elif kind == 5:
        text = rng.choice(
            [
                "a = " + "[" * 50_000,
                "x" * 100_000,
                "base = " + "9" * 5000,
                ".".join("a" * 3000) + " = 1",
                "\0",
                "",
                "base = 1e999",
            ]
        )
        path.write_text(text)
        wrong = True
    elif kind == 6:
        special(rng, path)
        wrong = True
    else:
        path.write_bytes(rng.randbytes(500))
        wrong = True
    if path.exists() or path.is_symlink():
        if cli("ablate", path, "--dry-run") == 0 and wrong:
            raise Fault("what is no study was laid out")
        if path.is_dir():
            path.rmdir()
        else:
            path.unlink()


def data(rng, world):
    """A data folder that is not as it should be."""
    folder = world.fresh()
    shutil.copytree(world.data, folder)
    split = folder / f"{rng.choice(['train', 'validation'])}.jsonl"
    lines = split.read_text().splitlines()
    wrong = True
    kind = rng.randrange(9)
    if kind < 3:
        row = json.loads(rng.choice(lines))
        bad = rng.choice([odd(rng), {**row, "label": odd(rng)}, {**row, "sentence": odd(rng)}, mutated(rng, row)])
        lines.insert(rng.randrange(len(lines)), as_json(bad))
        split.write_bytes(("\n".join(lines) + "\n").encode("utf-8", errors="surrogatepass"))
        wrong = False
    elif kind == 3:
        bad = rng.choice(["[" * 100_000, '{"label": ' + "9" * 5000 + "}", "{", "\0", "nul", '{"a":' * 50_000])
        split.write_text("\n".join([*lines, bad]))
    elif kind == 4:
        split.unlink()
        special(rng, split)
    elif kind == 5:
        split.unlink()
        packed = gzip.compress("\n".join(lines).encode())
        bad = rng.choice([packed[: rng.randrange(len(packed))], b"", rng.randbytes(100), packed[:-5]])
        Path(f"{split}.gz").write_bytes(bad)
    elif kind == 6:
        split.unlink()
        # Blank lines, or one line, a thousand times as long as the file.
        block = rng.choice([b"\n", b" "]) * (1 << 20)
        Path(f"{split}.gz").write_bytes(gzip.compress(block, 9) * 150)
    elif kind == 7:
        split.write_bytes(rng.randbytes(rng.choice([0, 1, 1000])))
    else:
        bad = json.dumps({"sentence": "x" * rng.choice([10, 10**6]), "label": rng.choice([10**9, -1, 3, 0.5, True])})
        split.write_text("\n".join([*lines, bad]))
        wrong = False
    if cli("ablate", "lora", "--data", folder, "--model", world.model, "--seeds", "1", "--dry-run") == 0 and wrong:
        raise Fault("damaged data were taken")


def model_folders(rng, world):
    """A model's folder that is not as it should be."""
    folder = world.fresh()
    shutil.copytree(world.model, folder)
    config = folder / "config.json"
    plain = json.loads(config.read_text())
    wrong = True
    kind = rng.randrange(8)
    if kind < 3:
        config.write_text(as_json(mutated(rng, plain, rng.choice([1, 2]))))
        wrong = False
    elif kind == 3:
        key = rng.choice(["num_hidden_layers", "hidden_size", "vocab_size", "intermediate_size", "num_attention_heads"])
        config.write_text(json.dumps({**plain, key: rng.choice([10**9, 10**12, -1, 0, "x", 2**63, None, 1.5])}))
        wrong = False
    elif kind == 4:
        config.write_text(rng.choice(["[" * 100_000, "", "5", "[]", "null", '{"a":' * 50_000, "9" * 5000]))
    elif kind == 5:
        config.unlink()
        special(rng, config)
    elif kind == 6:
        config.write_text(
            json.dumps(
                {
                    **plain,
                    "auto_map": {"AutoConfig": "x.Y", "AutoModelForSequenceClassification": "x.Z"},
                    "model_type": rng.choice(["bert", "x"]),
                }
            )
        )
        wrong = False
    else:
        file = folder / rng.choice(["tokenizer.json", "model.safetensors", "tokenizer_config.json"])
        file.unlink(missing_ok=True)
        if rng.random() < 0.6:
            special(rng, file)
        else:
            file.write_bytes(rng.choice([b"", b"[" * 100_000, rng.randbytes(1000), b"5", b'{"model_max_length": "x"}']))
        wrong = False
        # Weights and words are asked for by a run alone; one of no steps is refused after they are loaded.
    task = lrkit.tasks.load_task(data=folders_data(world))
    del task
    if rng.random() < 0.5 or kind == 7:
        from lrkit.study.pretrained import load_pretrained
        from lrkit.tasks import Head

        took = not refused(
            lambda: load_pretrained(str(folder), Head(num_labels=2, problem_type="single_label_classification"))
        )
    else:
        took = cli("params", "lora", "--model", folder, "--steps", "10") == 0
    if took and wrong:
        raise Fault("a damaged model folder was taken")


def folders_data(world):
    return str(world.data)


def study_folders(rng, world):
    """A study's folder of which a file is not what it was."""
    folder = world.fresh()
    shutil.copytree(world.study, folder)
    files = [p for p in folder.rglob("*.json*") if p.is_file()]
    path = rng.choice([folder / "study.json", rng.choice(files)])
    kind = rng.randrange(5)
    text = path.read_text()
    if kind < 2:
        if path.suffix == ".json":
            path.write_text(as_json(mutated(rng, json.loads(text), rng.choice([1, 2]))))
        else:
            lines = text.splitlines()
            at = rng.randrange(len(lines))
            lines[at] = as_json(mutated(rng, json.loads(lines[at]), 2))
            path.write_text("\n".join(lines))
    elif kind == 2:
        path.write_text(
            rng.choice(["[" * 100_000, "", "5", "[]", "null", '{"a":' * 50_000, "9" * 5000, "\0", '{"format": 1}'])
        )
    elif kind == 3:
        path.unlink()
        special(rng, path)
    else:
        path.write_bytes(text.encode()[: rng.randrange(len(text))])
    cli("report", folder)


KINDS = {
    "states": (states, 10),
    "headers": (headers, 6),
    "bases": (bases, 2),
    "PEFT folders": (peft, 5),
    "arguments": (arguments, 5),
    "studies": (studies, 4),
    "data": (data, 3),
    "model folders": (model_folders, 3),
    "study folders": (study_folders, 2),
}


def case(seed, number, world):
    """Run one case. Returns its kind, and what was found (None for nothing)."""
    rng = random.Random(f"{seed} {number}")
    kind = rng.choices(list(KINDS), [weight for _, weight in KINDS.values()])[0]
    threads = torch.get_num_threads()
    began, found = time.monotonic(), None
    signal.alarm(SECONDS)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            KINDS[kind][0](rng, world)
    except Hung:
        found = f"more than {SECONDS} s"
    except Fault as fault:
        found = str(fault)
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        found = f"{type(error).__name__} at {Path(where.filename).name}:{where.lineno}: {str(error)[:160]}"
    finally:
        signal.alarm(0)
        torch.set_num_threads(threads)
    for left in world.folder.glob("case-*"):
        shutil.rmtree(left, ignore_errors=True)
    return kind, found, time.monotonic() - began


def fuzz(cases, seed, first=0, told=None):
    """Run cases. Returns how many there were by kind, and the faults as (number, kind, what)."""

    def ring(*_):
        raise Hung

    before = signal.signal(signal.SIGALRM, ring)
    counts, faults = collections.Counter(), []
    try:
        with tempfile.TemporaryDirectory() as folder:
            world = World(Path(folder))
            for number in range(first, first + cases):
                kind, found, seconds = case(seed, number, world)
                counts[kind] += 1
                if found is not None:
                    faults.append((number, kind, found))
                if told is not None:
                    told(number, kind, found, seconds)
    finally:
        signal.signal(signal.SIGALRM, before)
    return counts, faults


def main():
    """Run, tell, and exit with 1 where anything was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="the number of the first case")
    parser.add_argument("--slow", action="store_true", help="tell cases of more than a second")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    room = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE") + ROOM
    resource.setrlimit(resource.RLIMIT_AS, (room, room))
    begin = time.monotonic()

    def told(number, kind, found, seconds):
        if found is not None:
            print(f"case {number} ({kind}): {found}", flush=True)
        elif asked.slow and seconds > 1:
            print(f"case {number} ({kind}): {seconds:.1f} s", flush=True)

    counts, faults = fuzz(asked.cases, asked.seed, asked.first, told)
    by_kind = ", ".join(f"{kind} {counts[kind]}" for kind in KINDS)
    seconds = time.monotonic() - begin
    print(f"{sum(counts.values()):,} cases with seed {asked.seed} in {seconds:.0f} s ({by_kind}): {len(faults)} faults")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
