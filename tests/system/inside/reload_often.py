"""Has systemd read all unit files again, over and over, for as long as standard input is open.

    python3 reload_often.py

Prints "reloaded" for each time. Runs on the host under test, so: standard library only, Python 3.11 or later.
"""

import subprocess
import sys
import threading

told = threading.Event()


def wait_to_be_told() -> None:
    sys.stdin.read()
    told.set()


threading.Thread(target=wait_to_be_told, daemon=True).start()
while not told.wait(0.05):
    subprocess.run(["systemctl", "daemon-reload"], check=True)
    print("reloaded", flush=True)
