"""Reads one streamed completion at a URL, a server's own or the gateway's, for as long as standard input is open.

    python3 stream.py URL [TOKENS]

Prints a line for each piece of text, "piece <number> <seconds>", and last "end <how>": "told" when it was told to stop,
"server" when the server ended the answer. Runs on the host under test, so: standard library only, Python 3.11 or later.
"""

import json
import sys
import threading
import time
import urllib.request

_QUIET_SECONDS = 30


def main() -> None:
    told = threading.Event()

    def wait_to_be_told() -> None:
        sys.stdin.read()
        told.set()

    threading.Thread(target=wait_to_be_told, daemon=True).start()
    tokens = int(sys.argv[2]) if len(sys.argv) > 2 else 100_000
    question = {"prompt": "Once upon a time", "n_predict": tokens, "stream": True, "ignore_eos": True}
    request = urllib.request.Request(
        f"{sys.argv[1]}/completion", json.dumps(question).encode(), {"Content-Type": "application/json"}
    )
    number = 0
    with urllib.request.urlopen(request, timeout=_QUIET_SECONDS) as answer:
        for line in answer:
            if not line.startswith(b"data: "):
                continue
            if told.is_set():
                print("end told", flush=True)
                return
            piece = json.loads(line.removeprefix(b"data: "))
            if piece.get("stop"):
                break
            number += 1
            print("piece", number, time.monotonic(), flush=True)
    print("end server", flush=True)


main()
