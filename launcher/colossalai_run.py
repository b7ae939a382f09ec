"""Runs `colossalai run`, with its handling of arguments, environment, signals and exit status corrected."""

import contextlib
import functools
import importlib
import io
import multiprocessing
import os
import re
import shlex
import signal
import sys

# Variables that describe one machine or one login, and so must not be copied to another machine.
NOT_COPIED = re.compile(
    r"(PATH|LD_LIBRARY_PATH|HOME|HOST|HOSTNAME|PWD|OLDPWD|SHLVL|SHELL|USER|LOGNAME|MAIL|TERM|TMPDIR|TMP|TEMP|"
    r"LANG|DISPLAY|XAUTHORITY|_|(LC|SSH|XDG|DBUS|SLURM|BASH_FUNC)_.*)"
)


def import_cli():
    """Import the command line of Colossal-AI (seconds), without its warnings on packages not used here."""
    with contextlib.redirect_stderr(io.StringIO()):
        return importlib.import_module("colossalai.cli").cli


def run(options, script, args, stdin, stdin_writer, agent):
    """Start ``script`` on every machine through ``agent``, which runs torchrun there. -> exit status

    Args:
        options: of `colossalai run`.
        stdin, stdin_writer: the read end (file) and write end (descriptor) of the pipe that keeps the agents
            alive.
    """
    environment = dict(os.environ)
    failed = multiprocessing.Value("i", 0)
    several = any(option.startswith("--hostfile") for option in options)
    quote_command(script, args, agent, environment if several else {})
    hide_environment(environment, stdin_writer)
    pass_stdin(stdin)
    shorten_messages(failed, os.getpid())
    try:
        import_cli()(["run", *options, "--", script, *args])
    except SystemExit as end:
        if end.code is None:  # an error of its own; after a run the status is a number
            print("launch: `colossalai run` started nothing", file=sys.stderr)
            raise SystemExit(2) from None
        return failed.value or end.code
    except Exception as error:
        print(f"launch: `colossalai run`: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def quote_command(script, args, agent, environment):
    """Quote every word of the command, because `colossalai run` joins them with blanks for a shell.

    Programs and the folder get absolute paths, since the PATH of another machine may differ. ``environment``
    is copied to the other machines, quoted in the same way.
    """
    launcher = importlib.import_module("colossalai.cli.launcher.run")
    copied = [f"{name}={value}" for name, value in environment.items() if not NOT_COPIED.fullmatch(name)]
    words = shlex.join(["exec", "env", *copied, sys.executable, agent, "agent"])
    original, folder = launcher.get_launch_command, os.getcwd()

    def shell_command(user_script, user_args, **kwargs):
        line = original(user_script=shlex.quote(script), user_args=[shlex.quote(a) for a in args], **kwargs)
        return f"cd {shlex.quote(folder)} && " + line.replace("torchrun", words, 1)

    launcher.get_launch_command = shell_command


def hide_environment(environment, stdin_writer):
    """Show `colossalai run` one harmless variable; its child processes inherit the true environment.

    It writes `export NAME="VALUE"` for all of os.environ to a shell, which would execute a value with $().
    """

    def in_child():
        os.environ.update(environment)
        os.close(stdin_writer)

    os.environ.clear()
    os.environ["COLOSSALAI_RUN"] = "1"
    os.register_at_fork(after_in_child=in_child)
    os.chdir("/")


def pass_stdin(stdin):
    """Give ``stdin`` to the agents, which run as long as it is open."""
    import fabric

    for method in ("local", "run"):
        original = getattr(fabric.Connection, method)
        setattr(fabric.Connection, method, functools.partialmethod(original, in_stream=stdin))


def shorten_messages(failed, pid):
    """Store the exit status in ``failed``, and print errors without the tables of `colossalai run`.

    If one machine fails, stop the others, which would wait for it, by SIGUSR1 to ``pid``.
    """
    import click

    def echo(message="", **_):
        if message.startswith("Error: failed to run"):
            status = re.findall(r"^Exit code: (\d+)$", message, re.MULTILINE)
            if status:  # the agent has said why
                failed.value = failed.value or int(status[-1])
            else:
                print("launch:", message.rpartition("exception: ")[2], file=sys.stderr)
            os.kill(pid, signal.SIGUSR1)
        elif not re.fullmatch(r"\s*=+ .* =+|\S+: (success|failure|finish)", message):
            print(message, file=sys.stderr)

    click.echo = echo
