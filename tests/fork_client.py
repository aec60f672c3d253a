"""Stands for `python` and ends as the fork that runs its arguments: `python fork_client.py EXECUTABLE ADDRESS ...`."""

import json
import os
import signal
import socket
import sys

executable, address, *arguments = sys.argv[1:]
folder, environment = os.getcwd(), dict(os.environ)
request = {"executable": executable, "arguments": arguments, "folder": folder, "environment": environment}
body = json.dumps(request).encode()
server = socket.socket(socket.AF_UNIX)
server.connect(address)
socket.send_fds(server, [len(body).to_bytes(8, "big")], [0, 1, 2])
server.sendall(body)
status = int.from_bytes(server.recv(2) or b"\0\1", "big", signed=True)  # nothing from a server that was killed
if status < 0:
    signal.signal(-status, signal.SIG_DFL)
    os.kill(os.getpid(), -status)
os._exit(status)
