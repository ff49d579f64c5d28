"""Asks the API again and again, each time by a new connection, for as long as standard input is open.

    python3 ask_often.py unix:/run/magi-agent/api.sock PATH
    python3 ask_often.py tcp:127.0.0.1:8000 PATH

Prints a line for each question: "answered <status> <milliseconds>", "refused" where no connection could be made, and
"broken <what>" where one was made and no answer came. Runs on the host under test, so: standard library only, Python
3.11 or later.
"""

import http.client
import socket
import sys
import threading
import time

_PAUSE_SECONDS = 0.02
_ANSWER_SECONDS = 20.0


def connected(address: str) -> socket.socket:
    kind, _, place = address.partition(":")
    if kind == "unix":
        made = socket.socket(socket.AF_UNIX)
        made.settimeout(_ANSWER_SECONDS)
        made.connect(place)
        return made
    host, _, port = place.rpartition(":")
    return socket.create_connection((host, int(port)), _ANSWER_SECONDS)


def asked(address: str, path: str) -> str:
    began = time.monotonic()
    try:
        made = connected(address)
    except OSError as error:
        return f"refused {error}"
    connection = http.client.HTTPConnection("localhost")
    connection.sock = made
    try:
        connection.request("GET", path, headers={"Connection": "close"})
        answer = connection.getresponse()
        answer.read()
    except (OSError, http.client.HTTPException) as error:
        return f"broken {type(error).__name__} {error}"
    finally:
        connection.close()
    return f"answered {answer.status} {1000 * (time.monotonic() - began):.0f}"


def main() -> None:
    told = threading.Event()

    def wait_to_be_told() -> None:
        sys.stdin.read()
        told.set()

    threading.Thread(target=wait_to_be_told, daemon=True).start()
    while not told.wait(_PAUSE_SECONDS):
        print(asked(sys.argv[1], sys.argv[2]), flush=True)


main()
