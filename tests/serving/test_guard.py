"""Who may ask: the key, and browsers that were led here."""

import openai
import pytest
from serving_cases import parrot, running

from marlin_cli.commands.serve_run import key_of
from marlin_cli.errors import UsageError


@pytest.fixture(scope="module")
def server():
    served, schedulers, _ = parrot()
    with running(lambda: (served, schedulers), key="sesame") as server:
        yield server


@pytest.fixture(scope="module")
def open_server():
    served, schedulers, _ = parrot()
    with running(lambda: (served, schedulers)) as server:
        yield server


WRONG = [None, "", "sesame", "Bearer", "Bearer ", "Bearer sesam", "Bearer sesame2", "Basic sesame", "Bearer é"]


@pytest.mark.parametrize("given", WRONG)
def test_without_the_key_there_is_401(given, server):
    headers = {} if given is None else {"Authorization": given}
    for path in ("/v1/completions", "/v1/models", "/metrics", "/v1/requests/x", "/nothing"):
        status, answered, body = server.call("POST" if "completions" in path else "GET", path, b"{}", **headers)
        assert status == 401 and answered["WWW-Authenticate"] == "Bearer" and b"sesame" not in body


def test_with_the_key_there_is_an_answer(server):
    with openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="sesame", max_retries=0) as client:
        assert client.completions.create(model="parrot", prompt="ab", max_tokens=4).choices[0].text == "abab"
        with pytest.raises(openai.AuthenticationError, match="API key is missing or wrong"):
            client.with_options(api_key="x").models.list()
    for path in ("/", "/health", "/v1/health"):
        assert server.call("GET", path)[0] == 200


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "null", "http://127.0.0.1:1", "https://[", "http://127.0.0.1.evil.example"]
)
def test_pages_of_other_origins_are_403(origin, open_server):
    status, headers, body = open_server.call("POST", "/v1/completions", {"prompt": "a"}, Origin=origin)
    assert status == 403 and "access-control-allow-origin" not in headers and b"may not ask this server" in body


def test_its_own_page_may_ask(open_server):
    for host in (f"127.0.0.1:{open_server.port}", f"localhost:{open_server.port}"):
        assert open_server.call("POST", "/v1/completions", {"prompt": "a"}, Host=host, Origin=f"http://{host}")[0] == 200


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8080", "127.0.0.1.evil.example", "[::2]", "["])
def test_a_name_that_somebody_let_point_here_is_403(host, open_server, server):
    assert open_server.call("GET", "/v1/models", Host=host)[0] == 403
    assert server.call("GET", "/v1/models", Host=host, Authorization="Bearer sesame")[0] == 200


def test_a_head_too_long_is_431(open_server):
    status, headers, _ = open_server.call("GET", "/health", X="x" * 20_000)
    assert status in (400, 431)


def test_keys_come_from_an_option_a_file_or_the_environment(tmp_path, monkeypatch):
    monkeypatch.delenv("MARLIN_API_KEY", raising=False)
    assert key_of(None, None) is None
    (tmp_path / "key").write_bytes(b"of-a-file\nmore\n")
    monkeypatch.setenv("MARLIN_API_KEY", "of-environment")
    assert [key_of("x", None), key_of(None, str(tmp_path / "key")), key_of(None, None)] == ["x", "of-a-file", "of-environment"]
    for option, file, environment in (("a b", None, ""), (None, "missing", ""), (None, str(tmp_path), ""), (None, None, "")):
        monkeypatch.setenv("MARLIN_API_KEY", environment)
        with pytest.raises(UsageError, match=r"^(--api-key|MARLIN_API_KEY)"):
            key_of(option, file)
    (tmp_path / "key").write_bytes(b"\nkey")
    with pytest.raises(UsageError, match="a key is 1 to"):
        key_of(None, str(tmp_path / "key"))
