"""The rules of the layout, held by a test: who imports whom, and that dvc.yaml and the profiles know it."""

import ast
import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from dvc.repo import Repo
from ruamel.yaml import YAML

from pipeline.core import profiles
from pipeline.experiments import graph

ROOT = Path(__file__).parent.parent

# A module imports only from rows above its own, and from its own folder.
LAYERS = [
    {"core"},
    {"audio", "nn"},
    {"datasets"},
    {"upstreams", "mixtures"},
    {"separators"},
    {"evaluation"},
    {"training"},
    {"reporting", "separate"},
    {"export", "demo"},
    {"stages"},
    {"experiments", "__main__"},
]
STAGES = {stage.addressing: stage for stage in Repo(str(ROOT)).index.stages if stage.cmd}
PROFILES = profiles.names(ROOT)


def layer(module: str) -> int:
    return next(i for i, names in enumerate(LAYERS) if module.split(".")[1] in names)


MODULES = [
    ".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for p in sorted((ROOT / "pipeline").rglob("*.py"))
]


@pytest.mark.parametrize("module", [m for m in MODULES if m.count(".")])
def test_module_imports_only_from_lower_layers(module):
    package = ".".join(module.split(".")[:2])
    for name in graph.imports(module, ROOT):
        assert layer(name) < layer(module) or (name.startswith(package) and not name.startswith("pipeline.stages.")), (
            f"{module} imports {name}"
        )


def declared(stage) -> set[str]:
    """The Python files a stage depends on; a folder stands for all that is in it."""
    files = set()
    for dep in map(Path, map(str, stage.deps)):
        if dep.parts[0] == "pipeline":
            found = [ROOT / dep] if dep.suffix else sorted((ROOT / dep).rglob("*.py"))
            files |= {path.relative_to(ROOT).as_posix() for path in found}
    return files


def test_dvc_yaml_lists_the_code_and_the_params_of_every_stage():
    """DVC does not follow imports (treeverse/dvc#9195), so a forgotten one would leave stale outputs."""
    text = (ROOT / "dvc.yaml").read_text()
    assert graph.corrected(text, ROOT) == text, "python -m pipeline graph --write"


@pytest.mark.parametrize("line", ["pipeline/core/weights.py", "sed", "make_eval_pairs", "pipeline/stages/scan.py"])
def test_a_line_that_is_missing_in_dvc_yaml_is_put_back(line):
    text = (ROOT / "dvc.yaml").read_text()
    without = re.sub(rf"\n *- {line}\n", "\n", text, count=1)
    assert without != text
    assert sorted(graph.corrected(without, ROOT).splitlines()) == sorted(text.splitlines())


def test_the_last_report_outlives_one_that_fails():
    """DVC removes a stage's outputs before it runs, but those that persist; the report's are in no cache."""
    assert [out.def_path for out in STAGES["report"].outs if not out.persist] == []


def test_a_stage_whose_code_reads_the_ontology_depends_on_its_tables():
    for name, stage in STAGES.items():
        if "pipeline/core/ontology.py" in declared(stage):
            assert {"pipeline/core/assets", "pipeline"} & set(map(str, stage.deps)), name


def keys(node, above=()) -> set[tuple[str, ...]]:
    if not isinstance(node, dict) or above[-1:] == ("loss_weights",):  # its keys are names
        return {above}
    return {above} | {key for name in node for key in keys(node[name], (*above, name))}


@pytest.mark.parametrize("profile", PROFILES)
def test_every_profile_has_the_keys_of_the_default_and_names_what_differs_alone(profile, tmp_path):
    free = {*profiles.ENTRIES, "gate"}  # as many as one likes
    whole = [profiles.document(name, ROOT) for name in (profiles.DEFAULT, profile)]
    default, other = (keys({k: v for k, v in document.items() if k not in free}) for document in whole)
    assert other == default

    def repeated(differences, base, place=""):
        for key, value in differences.items():
            if key == "train" and place:  # of an entry: taken as it stands
                continue
            if isinstance(value, dict) and isinstance(base.get(key), dict) and key not in profiles.WHOLE and value:
                yield from repeated(value, base[key], f"{place}{key}.")
            elif key in base and value == base[key]:
                yield f"{place}{key}"

    if profile != profiles.DEFAULT:
        differences = YAML(typ="safe").load(ROOT / "profiles" / f"{profile}.yaml")
        assert list(repeated(differences, whole[0])) == []


def test_params_yaml_is_the_default_profile():
    assert (ROOT / "params.yaml").read_bytes() == (ROOT / "profiles/default.yaml").read_bytes()
    assert YAML(typ="safe").load(profiles.text("default", ROOT)) == YAML(typ="safe").load(ROOT / "params.yaml")


def assert_fits_every_stage(profile: Path) -> None:
    from pipeline.experiments.check import check_gates, check_params

    check_gates(check_params(profile))


@pytest.mark.parametrize("profile", PROFILES)
def test_every_profile_fits_the_params_of_every_stage(profile, tmp_path):
    (tmp_path / "params.yaml").write_text(profiles.text(profile, ROOT))
    assert_fits_every_stage(tmp_path / "params.yaml")


TO_TRY = [
    line
    for page in ("README.md", "docs/experiments.md", "docs/data.md")
    for line in re.findall(r"^dvc exp run (-S [^#$\\\n]+)[^$\n]*$", (ROOT / page).read_text(), re.MULTILINE)
]


@pytest.mark.slow
@pytest.mark.parametrize("line", TO_TRY)
def test_what_the_readme_has_one_try_fits_and_changes_something(line, tmp_path):
    from dvc.utils.hydra import apply_overrides

    assert len(TO_TRY) >= 16
    overrides = [word for word in shlex.split(line) if word != "-S"]
    path = tmp_path / "params.yaml"
    of_music = any(word.startswith(("mixit_music.", "music.")) for word in overrides)
    base = profiles.text("synthetic" if of_music else "default", ROOT)
    path.write_text(base)
    apply_overrides(path, overrides)
    assert_fits_every_stage(path)
    load = YAML(typ="safe").load
    after, before = load(path), load(base)
    assert after != before
    assert keys(after) == keys(before)  # a place that there is


@pytest.mark.slow
@pytest.mark.parametrize("profile", PROFILES)
def test_the_graph_of_every_profile_resolves(profile, tmp_path):
    for name in ("dvc.yaml", ".dvcignore"):
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "pipeline", tmp_path / "pipeline", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "params.yaml").write_text(profiles.text(profile, ROOT))
    params = profiles.document(profile, ROOT)
    # A dry run reads what a stage depends on, also where it would first be made: empty files and folders stand in.
    entries = {data: list(params[f"mixit_{data}"]) for data in ("music", "clips")}
    made = {str(item) for stage in STAGES.values() for item in (*stage.outs, *stage.deps)}
    made |= {
        f"data/{folder}/{name}" for names in entries.values() for name in names for folder in ("mixit", "mixit_scores")
    }
    of_features = list(params["mae_separators"])
    of_queries = [*of_features, *params["separators"]]
    made |= {f"data/upstreams/{name}.json" for name in of_features}
    made |= {f"data/performer/pretrained_{which}" for which in ("true", "false")}
    made |= {f"data/{folder}/{name}" for name in of_queries for folder in ("separators", "scores")}
    for path in (tmp_path / name for name in made if not (ROOT / name).is_relative_to(ROOT / "pipeline")):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch() if path.suffix else path.mkdir(exist_ok=True)
    dvc = [sys.executable, "-m", "dvc"]
    subprocess.run([*dvc, "init", "--no-scm", "-q"], cwd=tmp_path, check=True)
    environment = {**os.environ, "DVC_NO_ANALYTICS": "1"}
    plan = subprocess.run([*dvc, "repro", "--dry"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert plan.returncode == 0, plan.stderr
    per_split = {"resample", "mine_anchors", "make_eval_pairs"}
    expected = {name for name in STAGES if "@" not in name or name.split("@")[0] in per_split}
    expected |= {
        f"{stage}@{name}" for name in of_features for stage in ("train_mae_separator", "evaluate_mae", "probe")
    }
    expected |= {f"evaluate@{name}" for name in of_queries if name not in of_features}
    expected |= {f"{stage}_mixit@{name}" for name in entries["music"] for stage in ("train", "evaluate")}
    expected |= {f"{stage}_mixit_clips@{name}" for name in entries["clips"] for stage in ("train", "evaluate")}
    for name in expected:
        assert f"Running stage '{name}'" in plan.stdout


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").glob("[a-z]*.py")), ids=lambda p: p.stem)
def test_a_benchmark_can_be_imported(path):
    """They are not run by the tests, so that a name they use could go unnoticed."""
    module = importlib.import_module(f"benchmarks.{path.stem}")
    assert callable(module.main)


LONG_FILES = {  # of more than 450 lines, and why
    "audio/recording.py": "every fault of a file that decoders pass over in silence, beside the reading that finds it",
    "core/runtime.py": "what every stage begins and ends with: locks, scratch, atomic files, memory, signals, errors",
    "datasets/synthetic.py": "a generated corpus with its own instruments; nothing else imports it",
    "mixtures/shards.py": "writer and reader of one format, which check each other",
    "mixtures/tracks.py": "scan, segments and reader of music: to be divided along these when one of them changes",
    "upstreams/mae.py": "one published network: encoder, both decoders, and the loading of three kinds of checkpoints",
}
LONG_FUNCTIONS = {  # of more than 60 lines
    "mixtures/shards.py: write_shard": "one transaction",
    "mixtures/tracks.py: scan": "one pass over a track, its files open side by side",
    "separators/performer.py: __init__": "a list of layers and checks of the arguments that size them",
    "stages/pretrain_performer.py: _learn": "state of a training: what is resumed, a step, what is kept",
    "stages/train_mixit.py: train_mixit": "the same, with early stopping",
    "training/loop.py: fit": "the same, for all models with queries",
}


def test_what_is_long_has_its_reason():
    """No file over 450 lines and no function over 60 but these; and these are not kept when they are no longer so."""
    files, functions = set(), set()
    for path in sorted((ROOT / "pipeline").rglob("*.py")):
        name, text = path.relative_to(ROOT / "pipeline").as_posix(), path.read_text()
        files |= {name} if text.count("\n") > 450 else set()
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= 60:
                functions.add(f"{name}: {node.name}")
    assert files == set(LONG_FILES)
    assert functions == set(LONG_FUNCTIONS)


def test_every_docstring_can_be_read_alone():
    """A sentence of four words or more, which does not lean on the one before it."""
    found = []
    for path in sorted((ROOT / "pipeline").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and (text := ast.get_docstring(node)) is not None:
                words = text.split()
                if (
                    len(words) < 4
                    or words[0] in ("Of", "As", "That", "What")
                    or words[:2] in (["The", "same"], ["For", "a"])
                ):
                    found.append(f"{path.relative_to(ROOT)}:{node.lineno}: {' '.join(words[:8])}")
    assert found == []


def test_the_root_of_the_package_holds_packages_alone():
    files = {path.name for path in (ROOT / "pipeline").glob("*.py")}
    assert files == {"__init__.py", "__main__.py"}


def test_modules_are_found_under_the_names_they_had_before_the_packages():
    code = (
        "import pipeline.config, pipeline.core.config as new, pipeline.music; from pipeline import moms;"
        "assert pipeline.config is new and new.__spec__.name == 'pipeline.core.config'; print(moms.__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "pipeline.mixtures.moms\n"), done.stderr
    done = subprocess.run([sys.executable, "-m", "pipeline.gate", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "metrics.json" in done.stdout
