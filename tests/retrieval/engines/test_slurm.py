"""Tasks as a Slurm array: what is asked of sbatch, a whole build through a stand-in that runs elements."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from pathlib import Path

import pytest

from vlm.cli import main
from vlm.errors import InvalidInput
from vlm.retrieval.engines.slurm import SlurmEngine, _ranges
from vlm.retrieval.engines.tasks import EmbedOptions, read_tasks, write_tasks
from vlm.retrieval.manifest import FORMAT, Manifest, identify
from vlm.retrieval.upkeep.verification import verify_folder

# runs each element of the array as a process of its own, as Slurm would on some machine
SBATCH = """#!/bin/sh
here=$(dirname "$0")
[ -e "$here/refuse" ] && { echo 'sbatch: error: invalid partition specified: x' >&2; exit 1; }
printf '%s\\n' "$@" > "$here/arguments"
for last; do case "$last" in --array=*) array=${last#--array=};; esac; done
for range in $(echo "$array" | tr , ' '); do
  for n in $(seq "${range%-*}" "${range#*-}"); do
    touch "$here/running-$n"
    (
      SLURM_ARRAY_TASK_ID=$n sh "$last" > "$here/log-$n" 2>&1 < /dev/null
      rm "$here/running-$n"
    ) > /dev/null 2>&1 &
  done
done
echo '17;cluster'
"""
SQUEUE = """#!/bin/sh
here=$(dirname "$0")
[ -e "$here/forgotten" ] && { echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1; }
[ -e "$here/unreachable" ] && { echo 'Unable to contact slurm controller' >&2; exit 1; }
ls "$here" | sed -n 's/^running-/17_/p'
"""


@pytest.fixture
def slurm(tmp_path, monkeypatch) -> Path:
    """A folder whose sbatch and squeue are found first."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, script in (("sbatch", SBATCH), ("squeue", SQUEUE)):
        (folder / name).write_text(script)
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return folder


@pytest.fixture
def listing(films, tmp_path, make_encoder):
    """Tasks of one file each."""
    from vlm.retrieval.embedding import choose_layout

    model = make_encoder()
    manifest = Manifest(
        format=FORMAT,
        model=identify(model, None),
        preprocessing=model.preprocessing,
        features=choose_layout(model, None, 4),
        segment_s=8,
        stride_s=4,
    )
    folder = tmp_path / "it's 100% tasks; really"
    return write_tasks(
        folder, manifest, sorted(films.iterdir()), options=EmbedOptions(num_workers=3), files_per_task=1
    )


def test_ranges() -> None:
    assert _ranges([0, 1, 2, 5, 7, 8]) == "0-2,5,7-8" and _ranges([4]) == "4"


def test_what_is_asked_of_sbatch(listing, slurm, monkeypatch) -> None:
    monkeypatch.setattr("vlm.retrieval.engines.slurm.MAX_ELEMENTS", 3)
    (slurm / "sbatch").write_text('#!/bin/sh\nprintf "%s\\n" "$@" > "$(dirname "$0")/arguments"\necho 17\n')
    engine = SlurmEngine(options=("partition=gpu", "comment=a 'quoted' word", "exclusive"))
    missing = [listing.tasks[n] for n in (0, 3, 5)]
    assert engine(listing, missing) == (
        "Slurm's job 17 does the others; run the same command again when it is over"
    )
    asked = (slurm / "arguments").read_text().splitlines()
    assert "--array=0,2" in asked and "--cpus-per-task=3" in asked and asked[-1].endswith("/array.sh")
    assert asked[-4:-1] == ["--partition=gpu", "--comment=a 'quoted' word", "--exclusive"]
    assert any(word.endswith("it's 100%% tasks; really/slurm-%A-%a.log") for word in asked)
    # the script's words reach the program as they are
    script = Path(asked[-1]).read_text()
    words = shlex.split(script.splitlines()[-1])
    assert words[-4:] == ["task", str(listing.folder), "--step", "3"]
    assert subprocess.run(["sh", "-n", asked[-1]], check=False).returncode == 0
    # not sent twice while it is there, or while nobody knows
    (slurm / "arguments").unlink()
    for name in ("running-0", "unreachable"):
        (slurm / name).touch()
        engine(listing, missing)
        assert not (slurm / "arguments").exists()
        (slurm / name).unlink()
    (slurm / "forgotten").touch()
    engine(listing, missing)
    assert (slurm / "arguments").exists()


def test_without_slurm_and_refused(listing, slurm, monkeypatch) -> None:
    (slurm / "refuse").touch()
    (slurm / "sbatch").write_text(SBATCH)
    with pytest.raises(InvalidInput, match="refused the job: sbatch: error: invalid partition.*--slurm-opt"):
        SlurmEngine()(listing, listing.tasks)
    monkeypatch.setenv("PATH", "/nowhere")
    said = SlurmEngine(options=("partition=a b",))(listing, listing.tasks)
    assert said.startswith("there is no sbatch here; where it is, run sbatch --parsable")
    assert "'--partition=a b'" in said and shlex.quote(str(listing.folder / "array.sh")) in said


def test_flags_of_other_engines(films, tmp_path, capsys) -> None:
    build = ["index", "build", str(films), "--out", str(tmp_path / "i"), "--model", "none"]
    for flags in (["--wait"], ["--engine", "ray", "--slurm-option", "a=b"], ["--ray-address", "a:1"]):
        assert main([*build, *flags]) == 2
        assert "with --engine" in capsys.readouterr().err


@pytest.mark.slow
def test_a_whole_build(films, tmp_path, slurm, saved_model, monkeypatch, capsys, state, local, root) -> None:
    """Every element of the first job is killed, the second job does what is missing."""
    from vlm.models import load_model

    for name in ("3", "4", "5", "a-copy"):
        (films / f"{name}.mp4").unlink()
    monkeypatch.setenv("PYTHONPATH", str(root))
    monkeypatch.setattr("vlm.retrieval.engines.slurm.POLL_S", 0.2)
    index = tmp_path / "it's an index"
    flags = ["--engine", "slurm", "--wait", "--files-per-task", "2", "--workers", "1", "--batch-size", "1"]
    build = ["index", "build", str(films), "--out", str(index), "--model", str(saved_model), *flags, "--json"]
    monkeypatch.setenv("CRASH_AT", "before-task-done")
    assert main(build) == 75
    errors = capsys.readouterr().err
    assert "0 of 2 tasks are done; Slurm's job 17 is over, its logs are in" in errors
    assert len(read_tasks(index.with_name("it's an index.tasks")).missing()) == 2
    monkeypatch.delenv("CRASH_AT")
    assert main(build) == 3, capsys.readouterr().err
    report = json.loads(capsys.readouterr().out)
    assert (report["num_added"], len(report["rejected"])) == (3, 1) and verify_folder(index) == []
    assert "--array=0-1" in (slurm / "arguments").read_text().splitlines()
    model = load_model(str(saved_model))
    assert state(index) == local(tmp_path / "local", [films], model, batch_size=1)
