"""A study file is the table or figure that it is named after; its profiles say where it runs."""

from __future__ import annotations

import json
import re
from pathlib import Path

import attrs
import paper_settings
import pytest

import lrkit
from lrkit.accounting import count
from lrkit.actions import Freeze
from lrkit.cli import main
from lrkit.registry import Registry
from lrkit.study.catalogue import about, catalogue
from lrkit.study.execute import check
from lrkit.study.models import empty_model
from lrkit.study.paired import smallest_p
from lrkit.study.plan import lay_out, read_study, study_from
from lrkit.study.shipped import with_profile

CLAIMS = ("adalora-choices", "adalora-tuned", "aflora-choices", "aflora-tuned", "newer")
CLAIMS += ("prompts", "questions", "teacher", "where-the-rank-goes")
"""Studies of claims rather than of a paper's table: each runs where it is, and has no profiles."""
CORE = [name for name in Registry(discover=False).names("study") if name not in CLAIMS]
FIRST = {"adalora-table-3": "flan-t5-small", "aflora-gsm8k": "smollm2"}
"""The first profile of those whose task is none for the embedded model: the others' is minilm."""
SIX = ["cola", "sst2", "mrpc", "qnli", "stsb", "rte"]


def plan_of(name: str, profile: str | None = None):
    return lay_out(read_study(name, profile=profile))


@pytest.mark.parametrize("name", [name for name in CORE if name not in FIRST])
def test_embedded_profile_runs(name):
    """The first profile of every file is the embedded model and data, it says its rates, and every row attaches."""
    plan = plan_of(name)
    assert plan == plan_of(name, "minilm")
    paper_settings.check_minilm(plan)
    check(plan)


@pytest.mark.parametrize("name", CLAIMS)
def test_claims_can_be_decided(name):
    """Every row of a study of claims attaches, has a margin and enough seeds, and its tuning seeds are its own."""
    study = read_study(name)
    # Where all its tasks are the hub's, its rows attach to the embedded model.
    local = [task for task in study.tasks if task.task in ("movies", "teacher")]
    here = attrs.evolve(study, tasks=local or read_study("aflora-tuned").tasks[:1], model="minilm")
    plan = lay_out(here)
    check(plan)
    assert study.margin and study.claims and all(claim.source for claim in study.claims)
    assert len(study.claims) * smallest_p(len(plan.seeds)) < 0.05, "Holm's correction leaves room"
    if study.tune is not None:
        assert not {*study.tune.tuning_seeds} & {*plan.seeds}
    assert {claim.higher for claim in study.claims} <= {row.label for row in plan.rows}


def test_claims_are_documented():
    """Each claim of each study stands in docs/replication.md, under its study's name, before any verdict does."""
    text = (Path(__file__).parent.parent.parent / "docs" / "replication.md").read_text()
    table = text[text.index("## The claims") :]
    for name in CLAIMS:
        assert f"| `{name}` |" in table
    assert table.count("\n| ") - 1 >= sum(len(read_study(name).claims) for name in CLAIMS)


def test_core_files_need_nothing():
    """lrkit's own files use lrkit's own methods; those that need a plug-in's ship with it."""
    assert set(CORE) == {
        *("adalora-figure-1", "adalora-figure-2", "aflora-figure-3", "aflora-figure-4"),
        *("adalora-table-3", "aflora-table-2", "aflora-table-3", "aflora-table-6", "aflora-gsm8k", "hybrid"),
    }
    assert not any(read_study(name).requires for name in CORE)


def test_adalora_figure_two():
    """AdaLoRA and LoRA at four budgets, from the initial ranks of the paper."""
    plan = plan_of("adalora-figure-2", "paper")
    paper_settings.check_adalora(plan, ["mnli"])
    found = {}
    for row in plan.rows:
        kind, budget = row.label.split(", ")
        s = row.method.scheduler
        found[kind, budget] = (None if s is None else s.target, row.method.parameterization.rank)
    for budget, (target, rank) in paper_settings.BUDGETS.items():
        assert found.pop(("AdaLoRA", budget)) == (target, rank)
        assert found.pop(("LoRA", budget)) == (None, target)
    assert not found


def test_adalora_table_three():
    """AdaLoRA and LoRA at the four budgets of BART-large, trained as the appendix says, each beside what is printed."""
    plan = plan_of("adalora-table-3", "paper")
    assert plan.study.model == "facebook/bart-large"
    net, published = empty_model("bart-large"), plan.study.published
    for row in plan.rows:
        kind, budget = row.label.split(", ")
        rank = {"2.20 %": 16, "1.10 %": 8, "0.26 %": 2, "0.13 %": 1}[budget]
        trained = count(row.method, net, total_steps=1000)
        assert trained.end == (540_672 + (192 if kind == "AdaLoRA" else 0)) * rank
        assert abs(100 * trained.end / 406_291_456 - float(budget.split()[0])) < 0.075
        assert set(published.values[row.label]) == {"xsum", "cnn_dailymail"}
        for task, settings in zip(plan.tasks, paper_settings.ADALORA_SUMMARIES.items(), strict=True):
            name, (batch, epochs, warmup, final, source, target, beams) = settings
            run, method = plan.settings(row, task, 0), plan.method(row, task)
            assert (task.name, run.batch_size, run.epochs, run.max_length) == (name, batch, epochs, source)
            assert (run.lr, run.lr_warmup, run.weight_decay, run.grad_clip) == (5e-4, 3000, 0.0, 0.0)
            assert task.options == {"max_target_length": target, "num_beams": beams}
            assert method.parameterization.alpha == 32
            if kind == "AdaLoRA":
                s, form = method.scheduler, method.parameterization
                assert (s.target, s.warmup, s.interval, s.final) == (rank, warmup, 100, final)
                assert form.rank == {16: 24, 8: 12, 2: 4, 1: 2}[rank] and form.orthogonality == 0.1
    here = plan_of("adalora-table-3")
    assert here == plan_of("adalora-table-3", "flan-t5-small") and {row.label for row in here.rows} == {
        f"{kind}, {budget}" for kind in ("AdaLoRA", "LoRA") for budget in ("2.20 %", "0.13 %")
    }
    for row in here.rows:
        form, task = here.method(row, here.tasks[0]).parameterization, here.tasks[0]
        assert form.alpha == 2 * form.rank and here.settings(row, task, 0).lr == (4e-3 if "Ada" in row.label else 1e-3)


def test_aflora_gsm8k():
    """LoRA and AFLoRA on GSM8K: 1 - u² of all matrices train between 30 % and 70 % of the steps, as in the code."""
    plan = plan_of("aflora-gsm8k", "paper")
    assert plan.study.model == "yahma/llama-7b-hf" and plan.tasks[0].name == "gsm8k"
    assert plan.tasks[0].options == {"max_new_tokens": 256, "num_beams": 4}
    for row, lr in zip(plan.rows, (3e-4, 2e-3, 2e-3), strict=True):
        run = plan.settings(row, plan.tasks[0], 0)
        assert (run.lr, run.batch_size, run.epochs, run.max_length, run.lr_warmup) == (lr, 1, 3, 256, 100)
        assert row.method.parameterization.rank == 32
        assert row.attach["targets"] == ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
    lora, code, cubic = (row.method for row in plan.rows)
    assert (lora.parameterization.alpha, lora.parameterization.dropout) == (64, 0.05)
    assert code == attrs.evolve(cubic, scheduler=code.scheduler) and code.parameterization.train == "both"
    assert [type(each.scheduler).__name__ for each in (code, cubic)] == ["Quadratic", "Cubic"]
    s = code.scheduler
    assert (s.target, s.warmup, s.final, s.interval, s.first_step) == (0.0, 0.3, 0.3, 10, 0)
    here = plan_of("aflora-gsm8k")
    assert here == plan_of("aflora-gsm8k", "smollm2") and [row.label for row in here.rows] == [
        row.label for row in plan.rows
    ]
    assert [here.settings(row, here.tasks[0], 0).lr for row in here.rows] == [3e-4, 2e-3, 2e-3]


def test_adalora_figure_one():
    """One kind of matrix in all layers or three whole layers, each with 0.28M parameters or close to it."""
    plan = plan_of("adalora-figure-1", "paper")
    paper_settings.check_adalora(plan, ["mnli"])
    net = empty_model("deberta-v3-base")
    seen = {}
    for row in plan.rows:
        adapted = lrkit.attach(net, row.method, **row.attach)
        places = [re.sub(r".*\.layer\.(\d+)\.", r"\1 ", name).split(" ") for name in adapted.adapters]
        seen[row.label] = (
            {int(layer) for layer, _ in places},
            {place for _, place in places},
            sum(p.numel() for p in adapted.adapter_parameters()),
        )
        adapted.detach()
    all_layers = set(range(12))
    kinds = {
        "W_q": "attention.self.query_proj",
        "W_k": "attention.self.key_proj",
        "W_v": "attention.self.value_proj",
        "W_o": "attention.output.dense",
        "W_f1": "intermediate.dense",
        "W_f2": "output.dense",
    }
    for label, place in kinds.items():
        assert seen.pop(label) == (all_layers, {place}, 276_480)
    for first in (1, 4, 7, 10):
        layers, places, parameters = seen.pop(f"layers {first}-{first + 2}")
        assert layers == set(range(first - 1, first + 2)) and places == set(kinds.values())
        assert parameters == pytest.approx(0.28e6, rel=0.04)
    assert not seen


def test_aflora_tables():
    """Tables 2, 3 and 6 and Figures 3 and 4: their rows, on the tasks and with the settings of the paper."""
    rows = {
        name: {r.label: r.method for r in plan_of(name, "paper").rows} for name in CORE if name.startswith("aflora")
    }
    for name in ("aflora-table-2", "aflora-table-3", "aflora-table-6", "aflora-figure-4"):
        paper_settings.check_aflora(plan_of(name, "paper"), SIX)
    paper_settings.check_aflora(plan_of("aflora-figure-3", "paper"), ["rte"])
    trainable, frozen = rows["aflora-table-2"]["trainable"], rows["aflora-table-2"]["frozen"]
    assert trainable.action is None and trainable.parameterization.train == "ffn"
    assert frozen.action is None and frozen.parameterization.train == "none"
    assert [m.parameterization.train for m in rows["aflora-table-3"].values()] == ["ffn", "attention", "both"]
    assert [m.action for m in rows["aflora-table-6"].values()] == [Freeze(together=False), Freeze(together=True)]
    metrics = [type(m.metric).__name__ for m in rows["aflora-figure-4"].values()]
    assert metrics == ["GradientUncertainty", "SensitivityUncertainty", "RatioUncertainty"]
    assert [type(m.parameterization).__name__ for m in rows["aflora-figure-3"].values()] == [
        *("VectorScaled", "LoRA", "VectorScaled")
    ]
    assert [m.parameterization.rank for m in rows["aflora-figure-3"].values()] == [4, 8, 1024]


def test_table_two_s_parameters():
    """Frozen, trainable and adaptive count as the paper prints them: 0.08M, 0.45M and about 0.14M on average."""
    plan = plan_of("aflora-table-2", "paper")
    net = empty_model("deberta-v3-base")
    counted = {row.label: count(plan.method(row, plan.tasks[1]), net, total_steps=10_000) for row in plan.rows}
    assert counted["frozen"].average == 83_232
    assert counted["trainable"].average == 451_872
    assert counted["aflora"].average == pytest.approx(139_000, rel=0.02), "ten epochs"


# ---- profiles --------------------------------------------------------------------------------------------------------

PLAIN = {
    "base": "lora",
    "set": {"rank": 4},
    "run": {"steps": 5, "lr": 1e-3},
    "rows": [{"label": "two", "set": {"rank": 2}}, {"label": "eight", "set": {"rank": 8}, "run": {"lr": 2e-3}}],
    "profile": {
        "small": {"model": "minilm", "run": {"steps": 3}},
        "large": {
            "set": {"alpha": 8.0},
            "task": "glue/rte",
            "rows": ["eight", {"label": "two", "run": {"lr": 5e-4}}, {"label": "one", "set": {"rank": 1}}],
        },
    },
}


def test_profiles_are_merged():
    """Settings are added to the file's, rows are picked, changed or added by label, and the first profile is the default."""
    small = with_profile(PLAIN, None, "f")
    assert small == with_profile(PLAIN, "small", "f")
    assert "profile" not in small and small["run"] == {"steps": 3, "lr": 1e-3} and small["rows"] == PLAIN["rows"]
    large = lay_out(study_from(with_profile(PLAIN, "large", "f"), "f"))
    assert [row.label for row in large.rows] == ["lora", "eight", "two", "one"]
    assert [row.method.parameterization.rank for row in large.rows] == [4, 8, 2, 1]
    assert [row.run for row in large.rows] == [{}, {"lr": 2e-3}, {"lr": 5e-4}, {}]
    assert large.rows[0].method.parameterization.alpha == 8.0 and large.tasks[0].name == "glue/rte"
    assert study_from(PLAIN, "f").run["steps"] == 3, "from plain data as from a file"


WRONG = {
    "no such": ({}, "larg", 'f has no profile "larg" (did you mean "large"?); there are small, large'),
    "none": ({"profile": {}}, "large", 'f has no profile "large"; it has none'),
    "no table": ({"profile": {"x": 3}}, None, "f: profile must be tables"),
    "no tables": ({"profile": 3}, None, "f: profile must be tables"),
    "base": ({"profile": {"x": {"base": "full"}}}, None, "f: profile x: base is the file's own"),
    "row": (
        {"profile": {"x": {"rows": ["too"]}}},
        None,
        'f: profile x: the file has no row "too" (did you mean "two"?)',
    ),
    "key": ({"profile": {"x": {"sead": 3}}}, None, 'f: there is no key "sead" (did you mean "seeds"?)'),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_profiles_are_told(case):
    """What is wrong with a profile is one line, with what would be right."""
    changes, profile, told = WRONG[case]
    with pytest.raises(lrkit.LrkitError, match=re.escape(told)) as error:
        study_from(with_profile({**PLAIN, **changes}, profile, "f"), "f")
    assert "\n" not in str(error.value)


def test_tasks_leave_rows_alone():
    """A task's settings reach rows that have them, and stay away from what a row says itself and from rows without."""
    plain = {
        "base": "adalora",
        "leave_out": ["penalty"],
        "swap": {"scheduler": ["linear", {"name": "linear", "warmup": 0.2}]},
        "rows": [
            {"label": "slow", "set": {"scheduler.interval": 7}},
            {"label": "plain", "set": {"scheduler.warmup": 0.15}},
            {"label": "full", "base": "full"},
        ],
        "tasks": [
            {
                "task": "movies",
                "set": {
                    "parameterization.orthogonality": 0.3,
                    "scheduler.interval": 5,
                    "scheduler.warmup": 30,
                },
            }
        ],
    }
    plan = lay_out(study_from(plain))
    methods = {row.label: plan.method(row, plan.tasks[0]) for row in plan.rows}
    schedules = {label: m.scheduler and (m.scheduler.interval, m.scheduler.warmup) for label, m in methods.items()}
    assert schedules == {
        "adalora": (5, 30),
        "scheduler=linear": (5, 30),
        "scheduler=linear(warmup=0.2)": (5, 0.2),
        "without penalty": (5, 30),
        "slow": (7, 30),
        "plain": (5, 0.15),
        "full": None,
    }
    assert methods["adalora"].parameterization.orthogonality == 0.3
    assert methods["without penalty"].parameterization.orthogonality == 0
    with pytest.raises(lrkit.LrkitError, match="intervall"):
        lay_out(study_from({**plain, "tasks": [{"task": "movies", "set": {"scheduler.intervall": 5}}]}))


# ---- plug-ins' studies, and the command line -------------------------------------------------------------------------

TEXT = (
    'title = "A plug-in\'s"\nnote = "Told."\nbase = "lora"\n[profile.minilm]\nseeds = 2\n[profile.paper]\nseeds = 3\n'
)


class Plugin:
    """A plug-in with studies, as text and as a file."""

    def __init__(self, studies):
        self.studies = studies

    @lrkit.hookimpl
    def lrkit_studies(self):
        return self.studies


@pytest.fixture
def registry(monkeypatch, tmp_path):
    (tmp_path / "file.toml").write_text(TEXT)
    studies = {
        "as-text": TEXT,
        "as-file": tmp_path / "file.toml",
        "gone": tmp_path / "gone.toml",
        "torn": "base = [",
        "needy": 'base = "lora"\nrequires = ["lrkit-sora", "Acme_Studies"]\n',
    }
    made = Registry([("acme-studies 1.0", "acme", Plugin(studies))], discover=False)
    assert not made.problems
    monkeypatch.setattr("lrkit.registry.current", lambda: made)
    return made


def call(capsys, *arguments):
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    return ended.value.code or 0, out, err


def test_plug_ins_ship_studies(registry, capsys):
    """A study of a plug-in is listed with who brought it, shown, and laid out by its name and profile."""
    for name in ("as-text", "as-file"):
        assert read_study(name).seeds == 2 and read_study(name, profile="paper").seeds == 3
        assert about(name) == "A plug-in's\n\nTold.\n\nProfiles: minilm (the default), paper."
    code, out, _ = call(capsys, "ablate", "--list", "--json")
    listed = json.loads(out)
    assert code == 0
    assert listed["as-text"] == {
        "name": "as-text",
        "title": "A plug-in's",
        "profiles": ["minilm", "paper"],
        "distribution": "acme-studies 1.0",
    }
    assert set(CORE) <= set(listed) and not {"gone", "torn"} & set(listed)
    code, out, _ = call(capsys, "plugins", "show", "as-text")
    assert code == 0 and "A plug-in's" in out and "acme-studies 1.0" in out


def test_broken_studies_concern_themselves(registry, capsys):
    """A plug-in's file that cannot be read is one warning in the list, one line when asked for, and stops no other."""
    code, out, err = call(capsys, "ablate", "--list")
    assert code == 0 and "as-text" in out and "minilm is the embedded model" in out
    assert len(err.splitlines()) == 2 and all("acme-studies 1.0" in line for line in err.splitlines())
    for name, told in (("gone", 'study "gone" cannot be read'), ("torn", "torn: no TOML")):
        code, _, err = call(capsys, "ablate", name, "--dry-run")
        assert code == 2 and told in err and len(err.splitlines()) == 1
    assert lay_out(read_study("as-text")).seeds == (0, 1)


def test_missing_plug_ins_are_named(registry, capsys):
    """A study whose plug-in is not installed is refused in one line with the distribution to install."""
    code, _, err = call(capsys, "ablate", "needy", "--dry-run")
    assert code == 2
    assert err == "lrkit: needy needs lrkit-sora, which is not installed: pip install lrkit-sora\n"


ODD = {"a number": {"x": 3}, "bytes": {"x": b"base"}, "no names": {"": TEXT}}


@pytest.mark.parametrize("case", ODD)
def test_odd_offers_are_problems(case):
    """What is neither a path nor a text is told with the distribution."""
    with pytest.warns(lrkit.LrkitWarning, match="acme 1.0"):
        made = Registry([("acme 1.0", "acme", Plugin(ODD[case]))], discover=False)
    assert made.problems and "lrkit_studies" in made.problems[0].message


def test_profiles_on_the_command_line(registry, capsys, tmp_path):
    """--profile picks one, options beside it replace its values, and it is refused for what has none."""
    file = tmp_path / "mine.toml"
    file.write_text(TEXT.replace('base = "lora"', 'base = "lora"\nmodel = "minilm"\nrun = {steps = 20}'))
    for arguments, cells in ((["--profile", "paper"], 3), ([], 2), (["--profile", "paper", "--seeds", "4"], 4)):
        code, out, err = call(capsys, "ablate", file, *arguments, "--dry-run", "--json")
        assert code == 0, err
        assert json.loads(out)["cells"] == cells
    code, _, err = call(capsys, "ablate", "lora", "--profile", "paper", "--dry-run")
    assert code == 2 and '--profile is of a study file, and "lora" is none' in err
    code, _, err = call(capsys, "ablate", file, "--profile", "papre", "--dry-run")
    assert code == 2 and '(did you mean "paper"?); there are minilm, paper' in err


def test_folders_hide_no_study(registry, capsys, tmp_path, monkeypatch):
    """A study is found by its name beside a folder of that name: the one that it was run into. A file goes first."""
    monkeypatch.chdir(tmp_path)
    for name in (shipped := Registry(discover=False).names("study")):
        plain = read_study(name)
        (tmp_path / name).mkdir()
        assert read_study(name) == plain
    code, _, err = call(capsys, "ablate", "teacher", "--out", "teacher", "--dry-run", "--json")
    assert code == 0, err
    (tmp_path / shipped[0]).rmdir()
    (tmp_path / shipped[0]).write_text(TEXT)
    assert read_study(shipped[0]).title == "A plug-in's"


def test_profiles_from_python(tmp_path):
    """`lrkit.ablate` takes a study's name and a profile, and refuses a profile of what is no study file."""
    with pytest.raises(lrkit.LrkitError, match='hybrid has no profile "tiny"; there are minilm, paper'):
        lrkit.ablate("hybrid", profile="tiny", out=tmp_path / "out")
    with pytest.raises(lrkit.LrkitError, match='profile="paper" is of a study file'):
        lrkit.ablate("lora", profile="paper", out=tmp_path / "out")
    assert not Path(tmp_path / "out").exists()


def test_installed_studies_are_unique():
    """Every installed study has a title and two profiles, of which minilm is the first."""
    found = catalogue()
    assert len({study.name for study in found}) == len(found)
    for study in found:
        assert study.title and study.profiles == (
            () if study.name in CLAIMS else (FIRST.get(study.name, "minilm"), "paper")
        )
