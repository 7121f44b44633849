"""The page at /: fetched from nowhere else, and tried in headless Chromium as a person would."""

import contextlib
import json
import os
import subprocess

import page_reader
import pytest
from serving_cases import parrot, running


@pytest.fixture(scope="module")
def server():
    served, schedulers, _ = parrot()
    with running(lambda: (served, schedulers), key="sesame") as server:
        yield server


class Browser:
    """Headless Chromium, driven through a pair of pipes: JSON with a zero byte after it, both ways."""

    def __init__(self, profile):
        ours_in, theirs_out = os.pipe()
        theirs_in, ours_out = os.pipe()
        # Chromium reads descriptor 3 and writes descriptor 4.
        script = f'exec 3<&{theirs_in} 4>&{theirs_out}; exec "$@"'
        command = [page_reader.chromium(), "--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe"]
        command += [f"--user-data-dir={profile}", "about:blank"]
        self._process = subprocess.Popen(
            ["bash", "-c", script, "bash", *command], pass_fds=(theirs_in, theirs_out), stderr=subprocess.DEVNULL
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self._in, self._out, self._held, self._last = ours_in, ours_out, b"", 0
        self.events = []
        targets = self.ask("Target.getTargets")["targetInfos"]
        page = next(each for each in targets if each["type"] == "page")
        self._session = None
        self._session = self.ask("Target.attachToTarget", targetId=page["targetId"], flatten=True)["sessionId"]

    _session = None

    def ask(self, method, **parameters):
        self._last += 1
        message = {"id": self._last, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._last:
                assert "error" not in answer, answer
                return answer["result"]
            self.events.append(answer)

    def _read(self):
        while b"\0" not in self._held:
            part = os.read(self._in, 1 << 16)
            assert part, "the browser is gone"
            self._held += part
        message, _, self._held = self._held.partition(b"\0")
        return json.loads(message)

    def run(self, script):
        """The value of a script, which may be a promise."""
        result = self.ask("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def until(self, condition):
        """Wait in the page until a condition holds."""
        assert self.run(f"new Promise((done, fail) => {{ let n = 0; (function look() {{ if ({condition}) done(true);"
                        " else if (++n > 2000) fail(document.body.innerText); else setTimeout(look, 5); })(); })")  # fmt: skip

    def close(self):
        self._process.kill()
        self._process.wait()
        os.close(self._in)
        os.close(self._out)


@pytest.fixture(scope="module")
def page(server, tmp_path_factory):
    if page_reader.chromium() is None:
        pytest.skip("no Chromium on this machine (Debian: apt-get install chromium)")
    with contextlib.closing(Browser(tmp_path_factory.mktemp("chromium"))) as browser:
        browser.ask("Network.enable")
        browser.ask("Log.enable")
        browser.ask("Page.enable")
        browser.ask("Page.navigate", url=f"http://127.0.0.1:{server.port}/")
        browser.until("document.readyState === 'complete' && document.getElementById('run')")
        yield browser


def fill(page, **values):
    page.run("document.getElementById('form').reset()")
    values = {"key": "sesame", **values}
    for name, value in values.items():
        page.run(f"(document.getElementById({name!r}) || document.getElementsByName({name!r})[0]).value = {json.dumps(value)}")


def finished(page):
    page.run("document.getElementById('run').click()")
    page.until("!document.getElementById('run').disabled && document.getElementById('state').textContent")
    return [page.run(f"document.getElementById({name!r}).textContent") for name in ("text", "hex", "state")]


def test_it_is_one_document_with_a_policy(server):
    status, headers, body = server.call("GET", "/")
    reader = page_reader.PageReader(body.decode())
    assert status == 200 and reader.faults == [] and headers["Content-Type"] == "text/html; charset=utf-8"
    policy = headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "connect-src 'self'" in policy
    assert not any({"src", "href", "style", "onclick"} & attributes.keys() for _, attributes, _ in reader.elements)


def test_a_prompt_is_run_and_its_bytes_and_speed_are_shown(page):
    fill(page, prompt="čau ", max_bytes="12", seed="5")
    text, digits, state = finished(page)
    assert text == "čau čau č" and bytes.fromhex(digits) == text.encode()
    assert state.startswith("12 bytes · ") and "bytes/s" in state and state.endswith("· length · seed 5")


def test_bytes_that_are_no_text_are_shown_too(page):
    fill(page, prompt="ff 00 c3", max_bytes="4")
    page.run("document.querySelector('[name=kind][value=hex]').checked = true")
    text, digits, _ = finished(page)
    assert text == "\ufffd\0\ufffd\ufffd" and digits == "ff 00 c3 ff "


def test_what_is_refused_is_said(page):
    fill(page, prompt="x", temperature="-1")
    assert finished(page) == ["", "", "temperature must be 0 or more, found -1.0"]
    fill(page, prompt="x", key="wrong")
    assert finished(page)[2].startswith("the API key is missing or wrong")


def test_a_run_can_be_stopped_and_its_stream_is_freed(page, server):
    fill(page, prompt="x", max_bytes="4000")
    page.run("document.getElementById('run').click()")
    page.until("document.getElementById('hex').textContent.length > 2")
    page.run("document.getElementById('stop').click()")
    page.until("!document.getElementById('run').disabled")
    assert page.run("document.getElementById('state').textContent").endswith(" bytes · stopped")
    server.until(lambda: server.desk.open == 0)


def test_it_asks_nobody_else_and_breaks_no_rule(page, server):
    page.run("1")
    requests = [
        event["params"]["request"]["url"] for event in page.events if event.get("method") == "Network.requestWillBeSent"
    ]
    assert requests and all(url.startswith(f"http://127.0.0.1:{server.port}/") for url in requests)
    said = [event["params"] for event in page.events if event.get("method") in ("Log.entryAdded", "Runtime.exceptionThrown")]
    assert not [each for each in said if "Content Security Policy" in json.dumps(each)]
