"""A container's health check: exit code 0 when the service in it answers that it is ready, else 1 and why.

Runs by itself, every few seconds in every container: it imports nothing but what Python starts with and takes 20 ms
(`python -I -S container_health.py PORT`).
"""

import socket
import sys

ANSWER_S = 3.0
MAX_ANSWER_BYTES = 4096


def main(port: str) -> int:
    try:
        with socket.create_connection(("127.0.0.1", int(port)), timeout=ANSWER_S) as connection:
            connection.sendall(b"GET /ready HTTP/1.0\r\nHost: localhost\r\n\r\n")
            answer = b""
            while len(answer) < MAX_ANSWER_BYTES and (piece := connection.recv(MAX_ANSWER_BYTES)):
                answer += piece
    except OSError as error:
        print(f"no answer on port {port}: {error}")
        return 1
    head, _, body = answer.partition(b"\r\n\r\n")
    status = head.split(b" ", 2)[1:2]
    print(body.decode(errors="replace"))
    return 0 if status == [b"200"] else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
