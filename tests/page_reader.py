"""Reads pages back, by Python's own HTML parser and by headless Chromium."""

import json
import shutil
import subprocess
from html.parser import HTMLParser

VOID = {"meta", "br", "input", "line", "rect", "circle", "polyline"}

# Under these names Chromium is installed.
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


class PageReader(HTMLParser):
    """Elements in order as (name, attributes, text), and what is not nested properly."""

    def __init__(self, html):
        super().__init__(convert_charrefs=True)
        self.elements, self.faults, self._open = [], [], []
        self.feed(html)
        self.close()
        self.faults += [f"never closed: {name}" for name, _ in self._open]

    def handle_starttag(self, tag, attrs):
        self.elements.append([tag, dict(attrs), ""])
        if tag not in VOID:
            self._open.append((tag, len(self.elements) - 1))

    def handle_startendtag(self, tag, attrs):
        self.elements.append([tag, dict(attrs), ""])

    def handle_endtag(self, tag):
        if tag in VOID:
            return
        if not self._open or self._open[-1][0] != tag:
            self.faults.append(f"</{tag}> where {self._open[-1:]} is open")
        else:
            self._open.pop()

    def handle_data(self, data):
        if self._open:
            self.elements[self._open[-1][1]][2] += data

    def named(self, tag):
        """(attributes, text) of every element of this name."""
        return [(attributes, text) for name, attributes, text in self.elements if name == tag]

    def texts(self, tag):
        return [text for _, text in self.named(tag)]

    @property
    def data(self):
        """The numbers for programs."""
        [document] = [text for attributes, text in self.named("script") if attributes.get("id") == "data"]
        return json.loads(document)


def chromium():
    """The path of a browser, or None."""
    return next(filter(None, map(shutil.which, BROWSERS)), None)


def loaded(path, profile, width=1000):
    """The page at `path` as headless Chromium understood it, as HTML."""
    command = [chromium(), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}"]
    command += [f"--window-size={width},900", "--virtual-time-budget=1000", "--dump-dom", path.resolve().as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
