"""What the workflows on GitHub promise, and that CONTRIBUTING.md names files that exist."""

import fnmatch
import importlib
import re
import tomllib
from pathlib import Path

import pytest
import yaml

from scripts import check_wheel

CLONE = Path(__file__).resolve().parents[2]
GITHUB = CLONE / ".github"
pytestmark = pytest.mark.skipif(not GITHUB.exists(), reason="this is no clone: there is no .github")

PROJECT = tomllib.loads((CLONE / "pyproject.toml").read_text(encoding="utf-8"))
WORKFLOWS = ("linux", "macos", "release")
# The README's test command, which .ci/run looks for there too.
TEST_COMMAND = 'python3 -m venv .venv && .venv/bin/pip install -e ".[test]" && .venv/bin/pytest'


def text(name):
    return (CLONE / name).read_text(encoding="utf-8")


def workflow(name):
    loaded = yaml.safe_load(text(f".github/workflows/{name}.yml"))
    loaded["on"] = loaded.pop(True)  # YAML 1.1 reads the word as a boolean
    return loaded


def steps(job):
    return [(step.get("name"), step.get("uses", ""), step.get("run", "")) for step in job["steps"]]


def commands(job):
    return "\n".join(run for _, _, run in steps(job))


# ---- every workflow ------------------------------------------------------------------------------


def test_every_workflow_is_known():
    assert sorted(path.stem for path in (GITHUB / "workflows").iterdir()) == sorted(WORKFLOWS)


@pytest.mark.parametrize("name", WORKFLOWS)
def test_a_workflow_may_do_little_and_ends(name):
    """It reads the repository, one run per branch, and every job has a limit of time."""
    loaded = workflow(name)
    assert loaded["permissions"] == {"contents": "read"}
    assert "github.ref" in loaded["concurrency"]["group"]
    for title, job in loaded["jobs"].items():
        assert job["timeout-minutes"] <= 90, title
        wanted = {"id-token": "write"} if title == "publish" else None
        assert job.get("permissions") == wanted, title


@pytest.mark.parametrize("name", WORKFLOWS)
def test_actions_are_pinned_and_scripts_take_no_text_from_outside(name):
    for title, job in workflow(name)["jobs"].items():
        for step in job["steps"]:
            uses = step.get("uses", "")
            if uses and uses != "pypa/gh-action-pypi-publish@release/v1":
                assert re.fullmatch(r"actions/[\w-]+@[0-9a-f]{40}", uses), f"{title}: {uses}"
            if uses.startswith("actions/checkout@"):
                assert step["with"] == {"persist-credentials": False}, title
            # An expression inside a script is pasted into it, whatever it holds.
            assert "${{" not in step.get("run", ""), f"{title}: {step}"


# ---- linux, macos --------------------------------------------------------------------------------


def test_linux_runs_the_gate():
    loaded = workflow("linux")
    assert {"push", "pull_request"} <= set(loaded["on"])
    job = loaded["jobs"]["gate"]
    assert "bash .ci/run" in commands(job).splitlines()
    assert TEST_COMMAND in text(".ci/run")
    caches = [step["with"] for step in job["steps"] if "actions/cache@" in step.get("uses", "")]
    assert [c["path"] for c in caches] == ["${{ env.ROTORMLX_EMULATOR_CACHE }}"]
    assert "ROTORMLX_EMULATOR_CACHE" in job["env"]


def test_macos_runs_the_readmes_command_without_the_emulator():
    assert TEST_COMMAND in text("README.md").splitlines()
    job = workflow("macos")["jobs"]["metal"]
    assert TEST_COMMAND in commands(job).splitlines()
    assert job["env"]["ROTORMLX_EMULATOR"] == "off"
    # From 14 on the plain labels are arm64.
    assert int(re.search(r"'macos-(\d+)'", job["runs-on"])[1]) >= 15
    # A self-hosted machine never runs the code of a pull request.
    assert "github.event_name != 'pull_request' && vars.MACOS_RUNNER" in job["runs-on"]


def test_macos_keeps_what_it_measures():
    job = workflow("macos")["jobs"]["metal"]
    script = commands(job)
    assert "rotormlx doctor --output doctor.json" in script
    assert "scripts/bench_metal.py --short --output bench-metal" in script
    assert script.count('>> "$GITHUB_STEP_SUMMARY"') == 2
    uploads = [step for step in job["steps"] if "upload-artifact" in step.get("uses", "")]
    assert [step["with"]["path"] for step in uploads] == ["doctor.json", "bench-metal/"]
    for step in uploads:
        # They tell most where a test has failed.
        assert step["if"] == "${{ !cancelled() }}"


def test_a_short_benchmark_is_short(monkeypatch, tmp_path):
    """Its sizes replace the others."""
    monkeypatch.syspath_prepend(str(CLONE / "scripts"))  # scripts import each other by name
    bench_metal = importlib.import_module("bench_metal")
    asked = {}
    for name in ("decode_attention", "encoding", "prefill", "paper_table"):
        monkeypatch.setattr(
            bench_metal, name, lambda *sizes, name=name: asked.update({name: sizes}) or []
        )
    monkeypatch.setattr(bench_metal, "copy_bandwidth", lambda runs, size: 1e9)
    for name in ("write_figures", "plot_cases"):
        monkeypatch.setattr(bench_metal, name, lambda *a, **more: None)
    bench_metal.main(short=True, output=tmp_path, prefill_length=512)
    assert asked["decode_attention"] == ([1024, 4096], 5)
    assert asked["paper_table"] == ([1024, 16384], 5)


# ---- release -------------------------------------------------------------------------------------


def test_only_a_tag_is_published_and_only_after_every_check():
    loaded = workflow("release")
    assert loaded["on"] == {"push": {"tags": ["v*"]}, "workflow_dispatch": None}
    assert loaded["env"]["ROTORMLX_MLX"] == "plain"
    job = loaded["jobs"]["publish"]
    assert job["if"] == "github.event_name == 'push' && github.ref_type == 'tag'"
    assert job["environment"] == "pypi"
    checks = {title for title, other in loaded["jobs"].items() if "check_wheel" in commands(other)}
    assert checks == set(job["needs"]) == {"contents", "use"}


def test_each_machine_has_a_wheel_that_is_built_and_used_there():
    jobs = workflow("release")["jobs"]
    built = jobs["wheel"]["strategy"]["matrix"]["runner"]
    used = [row["runner"] for row in jobs["use"]["strategy"]["matrix"]["include"]]
    assert built == used
    table = PROJECT["tool"]["cibuildwheel"]
    machines = [identifier.partition("-")[2] for identifier in table["build"]]
    assert len(built) == len(machines) == len(check_wheel.MACHINES)
    for pattern in check_wheel.MACHINES:
        assert fnmatch.filter(machines, pattern.replace("_*_", "_")), pattern
    for environment in (table["environment"], table["macos"]["environment"]):
        assert environment["ROTORMLX_MLX"] == "plain"


# ---- pages for contributors ----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bug", "feature", "kernel_report"])
def test_an_issue_form_is_one(name):
    """What GitHub requires: a name, a description, and fields with different ids and labels."""
    form = yaml.safe_load(text(f".github/ISSUE_TEMPLATE/{name}.yml"))
    assert set(form) == {"name", "description", "labels", "body"}
    fields = [field for field in form["body"] if field["type"] != "markdown"]
    assert any(field.get("validations", {}).get("required") for field in fields)
    assert {field["type"] for field in fields} <= {"input", "textarea", "dropdown", "checkboxes"}
    for key in ([f["id"] for f in fields], [f["attributes"]["label"] for f in fields]):
        assert len(set(key)) == len(key)


def named_paths(page):
    """Paths in backticks: what has a slash, or the ending of a file."""
    for quoted in re.findall(r"`([^`\n]+)`", page):
        if re.fullmatch(r"[\w.-]+(/[\w.-]+)*/?", quoted) and (
            "/" in quoted or re.search(r"\.(py|md|toml|yml|h)$", quoted)
        ):
            yield quoted


def test_every_path_of_contributing_exists():
    missing = [
        f"CONTRIBUTING.md names {path}, which does not exist."
        for path in dict.fromkeys(named_paths(text("CONTRIBUTING.md")))
        if not (CLONE / path).exists()
    ]
    assert not missing, "\n".join(missing)


def test_questions_have_one_file_each():
    table = text("CONTRIBUTING.md").partition("## Where to look")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| ([^|]+\?) \| ([^|]+) \|$", table, re.MULTILINE)
    assert len(rows) >= 10
    answers = [list(named_paths(answer)) for _, answer in rows]
    assert all(len(paths) == 1 and not paths[0].endswith("/") for paths in answers), answers
    assert len({paths[0] for paths in answers}) == len(rows)


def test_the_changelog_knows_this_version():
    titles = re.findall(r"^## \[([^\]]+)\]", text("CHANGELOG.md"), re.MULTILINE)
    assert titles[:2] == ["Unreleased", PROJECT["project"]["version"]]
