"""The command line's frame: exit codes, messages, signals, streams, and a help that costs nothing."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import textwrap
from types import ModuleType

import pytest

from vlm import cli, errors


@pytest.fixture
def command(monkeypatch):
    """Register a command `probe` whose work is the given function."""

    def register(run, configure=lambda parser: None):
        module = ModuleType("probe_command", "Do what the test says.")
        module.EXAMPLE, module.configure, module.run = "vlm probe", configure, run
        monkeypatch.setitem(sys.modules, "probe_command", module)
        monkeypatch.setitem(cli.COMMANDS, "probe", ("probe_command", "do what the test says"))

    return register


def fail_with(error):
    def run(_arguments):
        raise error

    return run


@pytest.mark.parametrize("code", [0, 3])
def test_a_command_returns_its_code(command, code):
    command(lambda _arguments: code)
    assert cli.main(["probe"]) == code


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (errors.VlmError("went wrong"), 1, "vlm: went wrong"),
        (errors.UsageError("no such key"), 2, "vlm: no such key"),
        (errors.RejectedItems("2 of 5 rejected"), 3, "vlm: 2 of 5 rejected"),
        (errors.ConfigError("a.yaml: bad"), 4, "vlm: a.yaml: bad"),
        (errors.IntegrityError("damaged"), 5, "vlm: damaged"),
        (errors.NoSpaceError("full"), 6, "vlm: full"),
        (errors.BusyError("locked"), 75, "vlm: locked"),
        (errors.Interrupted("stopped", 15), 143, "vlm: stopped"),
        (KeyboardInterrupt(), 130, "vlm: interrupted; run the same command again"),
        (KeyError("x"), 1, "vlm: unexpected KeyError: 'x'; --debug shows where"),
        (
            OSError(errno.ENOSPC, "No space left on device", "out.npy"),
            6,
            "vlm: no space left while writing out.npy",
        ),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), 6, "vlm: no space left while writing a file"),
        (RuntimeError("database or disk is full"), 6, "vlm: no space left"),
        (RuntimeError("I/O error: File too large (os error 27)"), 6, "vlm: no space left"),
        (
            FileNotFoundError(errno.ENOENT, "No such file or directory", "a.mp4"),
            4,
            "vlm: a.mp4: No such file",
        ),
        (PermissionError(errno.EACCES, "Permission denied", "b"), 4, "vlm: b: Permission denied"),
        (
            OSError(errno.EROFS, "Read-only file system", "d"),
            4,
            "vlm: d: Read-only file system; choose another",
        ),
        (FileExistsError(errno.EEXIST, "File exists", "e"), 4, "vlm: e: File exists; choose another place"),
        (OSError(errno.EIO, "Input/output error"), 1, "vlm: unexpected OSError"),
    ],
)
def test_every_error_has_its_code_and_one_line(command, capsys, error, code, message):
    command(fail_with(error))
    assert cli.main(["probe"]) == code
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(message)
    assert printed.err.count("\n") == 1


def test_a_full_disk_is_found_behind_the_error_it_caused(command, capsys):
    def run(_arguments):
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError as full:
            raise RuntimeError("the writer gave up") from full

    command(run)
    assert cli.main(["probe"]) == 6


@pytest.mark.parametrize("argv", [["--debug", "probe"], ["probe", "--debug"]])
def test_debug_shows_the_traceback_and_keeps_the_code(command, capsys, argv):
    command(fail_with(errors.ConfigError("a.yaml: bad")))
    assert cli.main(argv) == 4
    printed = capsys.readouterr().err
    assert "Traceback" in printed and printed.endswith("vlm: a.yaml: bad\n")


def test_no_traceback_without_debug(command, capsys):
    command(fail_with(ZeroDivisionError("division by zero")))
    assert cli.main(["probe"]) == 1
    assert "Traceback" not in capsys.readouterr().err


def test_debug_after_two_dashes_belongs_to_the_command(command, capsys):
    seen = []
    command(
        lambda arguments: seen.append(arguments.words) or 0,
        lambda parser: parser.add_argument("words", nargs="*"),
    )
    assert cli.main(["probe", "--", "--debug"]) == 0
    assert seen == [["--debug"]]


@pytest.mark.parametrize("argv", [["nonsense"], ["--nonsense"], ["probe", "--nonsense"]])
def test_wrong_words_and_flags_are_usage_errors(command, capsys, argv):
    command(lambda _arguments: 0)
    assert cli.main(argv) == 2
    assert "usage: vlm" in capsys.readouterr().err


def test_hostile_names_do_not_reach_the_terminal_raw(command, capsys):
    command(fail_with(errors.InvalidInput("\x1b[2Jbad\rname: nothing usable")))
    assert cli.main(["probe"]) == 4
    assert capsys.readouterr().err == "vlm: \\x1b[2Jbad\\rname: nothing usable\n"


def test_help_names_every_command_with_an_example(capsys):
    assert cli.main([]) == 0
    assert cli.main(["--help"]) == 0
    printed = capsys.readouterr().out
    for name, (_module, summary) in cli.COMMANDS.items():
        assert name in printed and summary in printed


@pytest.mark.parametrize("name", sorted(cli.COMMANDS))
def test_every_command_has_help_with_an_example(capsys, name):
    assert cli.main([name, "--help"]) == 0
    assert f"example: vlm {name}" in capsys.readouterr().out


def test_the_handler_of_sigterm_is_put_back(command):
    before = signal.getsignal(signal.SIGTERM)
    command(lambda _arguments: 0)
    cli.main(["probe"])
    assert signal.getsignal(signal.SIGTERM) is before


def run_python(code: str, **options) -> subprocess.Popen:
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(code)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=os.getcwd(), **options
    )


WAITING = """
import sys, time, types
from vlm import cli
def run(_arguments):
    try:
        print("ready", flush=True)
        while True:
            try:
                time.sleep(0.05)
            except Exception:
                pass
    finally:
        print("state saved", flush=True)
module = types.ModuleType("waiting", "Wait.")
module.EXAMPLE, module.configure, module.run = "vlm waiting", lambda parser: None, run
sys.modules["waiting"] = module
cli.COMMANDS["waiting"] = ("waiting", "wait")
raise SystemExit(cli.main(["waiting"]))
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_end_with_their_code_after_the_work_has_cleaned_up(number, code):
    process = run_python(WAITING)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (code, "state saved\n")
    assert err.startswith("vlm: ") and err.count("\n") == 1


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_under_stdout_is_no_space():
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "vlm", "--help"]
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
        done = subprocess.run(
            command, stdout=full, stderr=subprocess.PIPE, text=True, check=False, env=environment
        )
    assert done.returncode == 6
    assert done.stderr.startswith("vlm: no space left") and done.stderr.count("\n") == 1


def test_a_reader_that_leaves_is_no_error():
    process = run_python(
        "from vlm.cli import main; import time; time.sleep(0.2); raise SystemExit(main(['--help']))"
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(timeout=30) == 0
    process.stderr.close()


def test_undecodable_file_names_can_be_printed():
    code = r"""
    import sys, types
    from vlm import cli
    module = types.ModuleType("names", "Print names.")
    module.EXAMPLE, module.configure = "vlm names", lambda parser: None
    module.run = lambda _arguments: print("clip\udcff.mp4") or 0
    sys.modules["names"] = module
    cli.COMMANDS["names"] = ("names", "print names")
    raise SystemExit(cli.main(["names"]))
    """
    process = run_python(code)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (0, "clip\\udcff.mp4\n", "")


def test_help_is_cheap():
    code = """
    import resource, sys
    heavy = ("torch", "numpy", "yaml", "av", "PIL", "faiss", "tqdm", "transformers")
    from vlm.cli import main
    assert main(["--help"]) == 0
    spent = resource.getrusage(resource.RUSAGE_SELF)
    loaded = [name for name in heavy if name in sys.modules]
    print(spent.ru_utime + spent.ru_stime, loaded, file=sys.stderr)
    """
    process = run_python(code)
    _out, err = process.communicate(timeout=30)
    seconds, _, loaded = err.strip().partition(" ")
    assert loaded == "[]"
    assert float(seconds) < 0.3


def test_help_of_every_command_leaves_torch_alone():
    code = """
    import sys
    from vlm.cli import COMMANDS, main
    for name in COMMANDS:
        assert main([name, "--help"]) == 0
        assert "torch" not in sys.modules, name
    assert main(["models", "list"]) == 0
    assert "torch" not in sys.modules
    """
    process = run_python(code)
    _out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")
