"""Spoils inputs at random and looks for what must not happen: tracebacks, hangs, memory, crashes, other text.

    python -m tests.fuzz --cases 10000 --seed 0 --log fuzz.jsonl       from the repository's folder
    python -m tests.fuzz --one 1234 --seed 0                           one case, with its traceback

Cases run in batches, a process each, so that a crash is seen. A case may take 10 seconds of processor time and 1 GiB of
memory beside what the process held before. The log has a line for each case; a run that was interrupted goes on from
it. Exits with 1 where a case failed.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import json
import os
import selectors
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

MOST_SECONDS = 10  # of processor time
_TICK, _MOST_TICKS = 0.5, 240  # of waiting here, so that time in which the machine pauses us all does not count
MOST_MIB = 1024
_CLOCK = os.sysconf("SC_CLK_TCK")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=1000, metavar="N")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", default="", metavar="K,K", help="only these kinds (default: all, in turn)")
    parser.add_argument("--log", type=Path, default=Path("fuzz.jsonl"), metavar="FILE")
    parser.add_argument("--batch", type=int, default=120, metavar="N", help="cases of a process")
    parser.add_argument("--one", type=int, metavar="CASE", help="run one case here")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    kinds = tuple(filter(None, args.kinds.split(",")))
    if args.child:
        return child(args.seed, kinds)
    if args.one is not None:
        from tests.fuzz.cases import run_case

        print(run_case(args.seed, args.one, kinds))
        return 0
    done = [json.loads(line) for line in args.log.read_text().splitlines()] if args.log.exists() else []
    known = {row["case"] for row in done if row["seed"] == args.seed}
    waiting = [case for case in range(args.cases) if case not in known]
    with args.log.open("a") as log:
        while waiting:
            batch, waiting = waiting[: args.batch], waiting[args.batch :]
            while batch:
                for row in rows_of(args.seed, args.kinds, batch):
                    done.append(row | {"seed": args.seed})
                    log.write(json.dumps(done[-1]) + "\n")
                    log.flush()
                    batch.remove(row["case"])
    return summary([row for row in done if row["seed"] == args.seed])


def rows_of(seed: int, kinds: str, cases: list[int]) -> Any:
    """The rows of these cases in turn, from a process of their own; ends after one that had to be killed."""
    argv = [sys.executable, "-X", "faulthandler", "-m", "tests.fuzz", "--child", "--seed", str(seed), "--kinds", kinds]
    process = subprocess.Popen(
        argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )
    assert process.stdin is not None and process.stdout is not None and process.stderr is not None
    process.stdin.write(json.dumps(cases).encode() + b"\n")
    process.stdin.close()
    for stream in (process.stdout, process.stderr):
        os.set_blocking(stream.fileno(), False)
    chooser = selectors.DefaultSelector()
    chooser.register(process.stdout, selectors.EVENT_READ)
    chooser.register(process.stderr, selectors.EVENT_READ)
    said, noise, running, over = b"", b"", None, False
    ticks, processor, ended = 0, 0.0, False
    while not over:
        heard = chooser.select(timeout=_TICK)
        ticks += not heard
        for key, _ in heard:
            data = key.fileobj.read() or b""
            if key.fileobj is process.stderr:
                noise = (noise + data)[-4000:]
            elif data:
                said += data
            else:
                over = True
        *lines, said = said.split(b"\n")
        for line in lines:
            row = json.loads(line)
            if "outcome" in row:
                running, ended = None, True
                yield row
            else:
                running, ticks, processor, noise = row, 0, processor_seconds(process.pid), b""
        if running is not None and not over:
            spent = processor_seconds(process.pid) - processor
            if spent > MOST_SECONDS or ticks > _MOST_TICKS:
                process.send_signal(signal.SIGABRT)  # faulthandler says where it is
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(10)
                process.kill()
                noise = (noise + (process.stderr.read() or b""))[-4000:]
                yield running | {"outcome": "hang", "seconds": spent, "failure": noise.decode(errors="replace")}
                running, ended = None, True
                break
    process.kill()
    code = process.wait()
    if running is not None:
        noise = (noise + (process.stderr.read() or b""))[-4000:]
        yield running | {"outcome": "crash", "failure": f"exit code {code}: {noise.decode(errors='replace')}"}
    elif not ended:
        raise SystemExit(f"a batch ended with {code} before its first case: {noise.decode(errors='replace')}")


def processor_seconds(pid: int) -> float:
    """Of all its threads so far."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / _CLOCK


def child(seed: int, kinds: tuple[str, ...]) -> int:
    """Runs the cases that standard input names; a line before and a line after each."""
    report = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what cases print
    cases = json.loads(sys.stdin.readline())
    faulthandler.enable()
    os.environ["HF_HUB_OFFLINE"] = "1"
    from tests.fuzz import cases as room

    room.warm_up()
    for case in cases:
        report.write(json.dumps({"case": case, "kind": room.kind_of(case, kinds)}) + "\n")
        before, clock = memory("VmRSS"), time.process_time()
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
        row: dict[str, Any] = {"case": case, "kind": room.kind_of(case, kinds)}
        try:
            row["outcome"] = room.run_case(seed, case, kinds)
        except BaseException as error:  # panics of other languages are no Exceptions
            if isinstance(error, KeyboardInterrupt):
                raise
            row |= {"outcome": "traceback", "failure": "".join(traceback.format_exception(error))[-3000:]}
        row["seconds"] = round(time.process_time() - clock, 2)
        row["mib"] = max(0, memory("VmHWM") - before)
        if row["mib"] > MOST_MIB:
            row |= {"outcome": "memory", "failure": row.get("failure", "")}
        report.write(json.dumps(row) + "\n")
    room.clean_up()
    os._exit(0)  # the server's threads


def memory(name: str) -> int:
    """MiB, as /proc says."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition(name + ":")[2].split()[0]) // 1024


def summary(rows: list[dict[str, Any]]) -> int:
    """Prints the counts; 1 where a case failed."""
    outcomes = Counter(row["outcome"] for row in rows)
    failed = [row for row in rows if row["outcome"] not in ("ran", "refused")]
    print(f"{len(rows)} cases: " + ", ".join(f"{count} {name}" for name, count in outcomes.most_common()))
    if rows:
        print(f"longest {max(r.get('seconds', 0) for r in rows):.1f} s, most {max(r.get('mib', 0) for r in rows)} MiB")
    for kind in sorted({row.get("kind", "?") for row in rows}):
        counts = Counter(row["outcome"] for row in rows if row.get("kind", "?") == kind)
        print(f"  {kind}: " + ", ".join(f"{count} {name}" for name, count in counts.most_common()))
    for row in failed[:20]:
        last = row["failure"].strip().splitlines()[-1:] or [""]
        print(f"case {row['case']}: {row['outcome']}: {last[0][:200]}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
