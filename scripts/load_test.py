#!/usr/bin/env python3
"""Loads a running `tinyllama serve` with streams and checks that each is whole.

    python scripts/load_test.py http://127.0.0.1:8000 [--clients 64] [--seconds 120] [--pid PID] [--key KEY]

Each client asks for one stream after the other; some leave in the middle (--leave). Prints requests and tokens a second,
latencies, and with --pid the server's memory at the start, after a quarter, and at the end. Exits with 1 where a
stream was not whole or the server still works when nobody listens. Standard library only.
"""

import argparse
import collections
import http.client
import json
import random
import re
import sys
import threading
import time
import urllib.parse


class Client(threading.Thread):
    def __init__(self, args, host, port, end, seed):
        super().__init__(daemon=True)
        self.args, self.host, self.port, self.end = args, host, port, end
        self.random = random.Random(seed)
        self.first, self.whole, self.tokens = [], [], 0
        self.outcomes = collections.Counter()
        self.connection = None

    def run(self):
        while time.monotonic() < self.end:
            leave = self.random.random() < self.args.leave
            start = time.monotonic()
            try:
                self.outcomes[self.ask(leave, start)] += 1
            except (OSError, http.client.HTTPException, ValueError) as error:
                self.outcomes[f"{type(error).__name__}: {error}"] += 1
                self.connection = None
        if self.connection:
            self.connection.close()

    def ask(self, leave, start):
        if self.connection is None:
            self.connection = http.client.HTTPConnection(self.host, self.port, timeout=120)
        body = {
            "prompt": "Llamas " * self.random.randint(1, 20),
            "max_tokens": self.random.randint(1, self.args.max_tokens),
            "seed": self.random.randrange(1000),
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self.args.key}"}
        self.connection.request("POST", "/v1/completions", json.dumps(body), headers)
        response = self.connection.getresponse()
        if response.status != 200:
            response.read()
            return f"status {response.status}"
        usage, finished, done, seen = None, 0, False, 0
        for line in response:
            if not line.startswith(b"data: "):
                continue
            seen += 1
            if seen == 1:
                self.first.append(time.monotonic() - start)
            if leave and seen == 3:
                self.connection.close()
                self.connection = None
                return "left"
            if line == b"data: [DONE]\n":
                done = True
                continue
            event = json.loads(line[6:])
            if "error" in event:
                return f"error: {event['error']['message']}"
            usage = event["usage"] or usage
            finished += sum(bool(choice["finish_reason"]) for choice in event["choices"])
        if not (done and finished == 1 and usage and usage["completion_tokens"] <= body["max_tokens"]):
            return "not whole"
        self.tokens += usage["completion_tokens"]
        self.whole.append(time.monotonic() - start)
        return "whole"


def memory(pid):
    """Resident memory of a process in MiB."""
    if pid is None:
        return None
    with open(f"/proc/{pid}/status") as file:
        return int(re.search(r"VmRSS:\s+(\d+)", file.read())[1]) / 1024


def percentiles(times):
    if not times:
        return "-"
    times = sorted(times)
    at = lambda share: times[min(len(times) - 1, int(share * len(times)))] * 1e3
    return f"p50 {at(0.5):.1f} ms, p99 {at(0.99):.1f} ms"


def metrics(host, port, key):
    connection = http.client.HTTPConnection(host, port, timeout=30)
    connection.request("GET", "/metrics", headers={"Authorization": f"Bearer {key}"})
    text = connection.getresponse().read().decode()
    connection.close()
    return dict(re.findall(r"^tinyllama_(\w+) (\S+)$", text, re.M))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("url")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--leave", type=float, default=0.05, help="share of streams that are left in the middle")
    parser.add_argument("--pid", type=int, help="the server's process, for its memory")
    parser.add_argument("--key", default="none")
    args = parser.parse_args()
    address = urllib.parse.urlparse(args.url)
    host, port = address.hostname, address.port or 80
    start = time.monotonic()
    rss = [memory(args.pid)]
    clients = [Client(args, host, port, start + args.seconds, seed) for seed in range(args.clients)]
    for client in clients:
        client.start()
    time.sleep(args.seconds / 4)
    rss.append(memory(args.pid))
    for client in clients:
        client.join(args.seconds + 120)
    took = time.monotonic() - start
    outcomes = sum((client.outcomes for client in clients), collections.Counter())
    tokens = sum(client.tokens for client in clients)
    for _ in range(50):
        after = metrics(host, port, args.key)
        if after["running"] == after["waiting"] == after["cache_blocks_used"] == "0":
            break
        time.sleep(0.1)
    rss.append(memory(args.pid))
    print(f"{args.clients} clients, {took:.1f} s: {dict(outcomes)}")
    print(f"{sum(outcomes.values()) / took:.1f} requests/s, {tokens / took:.0f} tokens/s")
    print("first event:", percentiles([t for client in clients for t in client.first]))
    print("whole stream:", percentiles([t for client in clients for t in client.whole]))
    print("left behind:", {k: after[k] for k in ("running", "waiting", "cache_blocks_used", "connections")})
    if args.pid:
        print("memory, MiB: start {:.1f}, after a quarter {:.1f}, end {:.1f}".format(*rss))
    bad = {what: count for what, count in outcomes.items() if what not in ("whole", "left")}
    idle = after["running"] == after["waiting"] == "0"
    sys.exit(0 if not bad and idle and outcomes["whole"] else 1)


if __name__ == "__main__":
    main()
