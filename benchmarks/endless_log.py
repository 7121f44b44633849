"""A log of a service that runs for long, with planted lines that nothing announces: for `benchmarks/endless.py`."""

import random

PATHS = ("/", "/index.html", "/api/v1/items", "/api/v1/items/{}", "/static/app.js", "/static/style.css", "/login", "/health")
AGENTS = ("Mozilla/5.0 (X11; Linux x86_64)", "curl/8.5.0", "kube-probe/1.31", "Mozilla/5.0 (Macintosh; Intel Mac OS X 14_5)")
TASKS = ("compaction", "snapshot", "flush", "rebalance")

# What operators want to see: an attack, broken hardware, a crash, noise, a login by a stranger, a clock that went back.
PLANTED = (
    b'10.0.3.17 - - "GET /cgi-bin/..%2f..%2f..%2fetc/passwd%00.html HTTP/1.1" 404 162 "sqlmap/1.8.4#stable (https://sqlmap.org)"\n',
    b"kernel: EDAC MC0: 1 UE memory read error on CPU_SrcID#0_Ha#0_Chan#2_DIMM#1 (channel:2 slot:1 page:0x1f3a92)\n",
    b"Traceback (most recent call last): KeyError: 'tenant_9c41' in shard_router.rebalance -> orphaned lease 0xdeadbeef\n",
    b"\x7fELF\x02\x01\x01\x00\x00\x00\x00\x00\x03\x00>\x00\x01\x00\x00\x00\xa0\x88\x1e\xc3\x9b\x04\xfa\xfe\x17\xd2\x8c\n",
    b"sshd[31337]: Accepted publickey for root from 203.0.113.66 port 41522 ssh2: ED25519 SHA256:q0ZxVvJm2T9eYw\n",
    b"ntpd: time stepped by -86399.734812 s; certificates issued tomorrow are not yet valid\n",
)


def made_log(total_bytes: int, seed: int = 0) -> tuple[bytes, list[int]]:
    """A log of about so many bytes, and the numbers (from 1) of its planted lines, which stand in its second half."""
    draw = random.Random(seed)
    lines: list[bytes] = []
    size, second = 0, 1_764_500_000
    while size < total_bytes:
        second += draw.randrange(3)
        lines.append(f"{second}.{draw.randrange(1000):03d} {_line(draw)}\n".encode())
        size += len(lines[-1])
    planted = []
    for number, text in enumerate(PLANTED):
        at = len(lines) // 2 + (2 * number + 1) * len(lines) // (4 * len(PLANTED))
        lines[at] = lines[at][:15] + text
        planted.append(at + 1)
    return b"".join(lines), planted


def _line(draw: random.Random) -> str:
    if draw.random() < 0.8:
        path = draw.choice(PATHS).format(draw.randrange(100_000))
        status = draw.choices((200, 304, 404, 500), (90, 6, 3, 1))[0]
        host = f"10.0.{draw.randrange(8)}.{draw.randrange(256)}"
        return f'{host} - - "GET {path} HTTP/1.1" {status} {draw.randrange(200, 9000)} "{draw.choice(AGENTS)}"'
    task = draw.choice(TASKS)
    return f"worker-{draw.randrange(16)} {task} finished in {draw.randrange(5, 900)} ms, {draw.randrange(1, 64)} segments"
