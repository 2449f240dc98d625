"""The key shows nowhere: texts of servers, representations, tracebacks."""

from __future__ import annotations

import copy
import pickle
import traceback

import pytest

from inranker_jax.errors import InputError
from inranker_jax.query_generation.http import Address
from inranker_jax.query_generation.secret import Secret, check_url, read_key

KEY = "sk-proj-Abc123Def456Ghi789"


@pytest.mark.parametrize(
    "text",
    [
        KEY,
        f"Incorrect API key provided: {KEY}. You can find",
        f"Bearer {KEY}{KEY}",
        KEY.upper(),
        f"key {KEY[:12]}",
        f"...{KEY[-8:]}",
        f"{KEY[:11]}*****{KEY[-7:]}",
    ],
)
def test_no_part_of_the_key_is_left(text: str) -> None:
    shown = Secret(KEY).hide(text)
    assert "[key]" in shown
    for start in range(len(KEY) - 5):
        assert KEY[start : start + 6].lower() not in shown.lower()


def test_other_text_stays() -> None:
    text = "rate limit of 60 requests a minute reached"
    assert Secret(KEY).hide(text) == text
    assert Secret(KEY).hide("") == ""


def test_short_keys_are_hidden_whole() -> None:
    assert Secret("abc").hide("key abc, not ab") == "key [key], not ab"


def test_answers_lose_real_keys_only() -> None:
    assert Secret(KEY).hide_exact(f"what is {KEY}?") == "what is [key]?"
    assert Secret("EMPTY").hide_exact("is the set EMPTY?") == "is the set EMPTY?"


def test_representations() -> None:
    secret = Secret(KEY)
    assert repr(secret) == str(secret) == f"{secret}" == "[key]"
    assert KEY not in str(vars(secret))
    assert secret.reveal() == KEY
    with pytest.raises(TypeError, match="not written"):
        pickle.dumps(secret)
    with pytest.raises(TypeError, match="not written"):
        copy.deepcopy(secret)


def test_the_key_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    assert read_key(None) is None
    monkeypatch.setenv("OPENAI_API_KEY", f"  {KEY}\n")
    found = read_key(None)
    assert found is not None
    assert found.reveal() == KEY


def test_a_key_in_place_of_its_name_is_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY, raising=False)
    with pytest.raises(InputError, match="no environment variable") as caught:
        read_key(KEY)
    assert KEY not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize("value", [f"{KEY} extra", f"{KEY}\nX-Other: 1", f"{KEY}\u2019", f"{KEY}\x00"])
def test_a_key_that_no_header_holds_is_not_repeated(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    """http.client would quote the whole header in its error."""
    if "\x00" in value:
        monkeypatch.setattr("os.environ", {"OPENAI_API_KEY": value})
    else:
        monkeypatch.setenv("OPENAI_API_KEY", value)
    with pytest.raises(InputError, match="the key alone") as caught:
        read_key(None)
    assert KEY not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize(
    "url",
    [
        f"https://user:{KEY}@host/v1",
        f"https://{KEY}@host/v1",
        f"https://user:{KEY}@host:port/v1",
        f"https://host/v1?key={KEY}",
        f"https://host/v1?{KEY}",
        f"https://host/v1?api-version=1&key={KEY}",
        f"https://host/v1?api-version=1;key={KEY}",
        f"https://host/v1#{KEY}",
        f"host/v1?key={KEY}",
        f"user:{KEY}@host/v1",
        f"https://[host?key={KEY}",
    ],
)
def test_a_url_that_could_hold_a_key_is_refused_without_it(url: str) -> None:
    with pytest.raises(InputError, match="--generator=openai:URL") as caught:
        check_url(url)
    assert KEY not in "".join(traceback.format_exception(caught.value))
    with pytest.raises(InputError):
        Address.parse(url)


def test_the_version_of_an_interface_may_stand_in_a_url() -> None:
    url = "https://me.openai.azure.com/openai/deployments/m?api-version=2024-10-21-preview"
    assert check_url(url).hostname == "me.openai.azure.com"
    assert Address.parse(url).query == "?api-version=2024-10-21-preview"
