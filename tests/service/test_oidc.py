"""Tokens of an issuer in place of keys, through the wire: who gets in, and what it may be told."""

import asyncio
import contextlib
import json
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from certificates import Issued
from clusters import free_ports
from issuers import ALGORITHMS, CONFIGURATION, KEYS_PATH, Issuer, jwk, unsigned
from keyed import shown
from tinsmith.keys import CHARACTERS_MAX
from tinsmith.v1 import checkpoint_service_pb2 as pb
from tinsmith.v1.checkpoint_service_pb2_grpc import CheckpointServiceStub
from tinsmithd.config import ConfigError
from tinsmithd.keys import KeyFile
from tinsmithd.oidc import issuer as fetching
from tls_servers import checkpoint
from waiting import until
from wire import reason_and_field

GOOD = "good"


@pytest.fixture
def issuer() -> Iterator[Issuer]:
    with Issuer() as running:
        yield running


class Asked:
    """A Checkpoint server that takes an issuer's tokens.

    Attributes:
        stub: Of it.
        key: A key of it.
    """

    def __init__(self, stub: CheckpointServiceStub, key: str) -> None:
        self.stub, self.key = stub, key

    async def ask(self, shown_: str) -> tuple[str, str]:
        """What comes of a call that shows something: its reason and what is said, or `GOOD`."""
        request = pb.CheckpointServiceGetCapabilitiesRequest()
        try:
            await self.stub.GetCapabilities(request, metadata=shown(shown_), timeout=60)
        except grpc.aio.AioRpcError as refused:
            return reason_and_field(refused)[0], refused.details() or ""
        return GOOD, ""

    async def reason(self, shown_: str) -> str:
        """The reason alone."""
        return (await self.ask(shown_))[0]

    async def until(self, shown_: str, reason: str) -> None:
        """Ask until the answer is another one."""
        async with asyncio.timeout(30):
            while await self.reason(shown_) != reason:
                await asyncio.sleep(0.02)

    async def watching(self, shown_: str) -> Any:
        """A stream that is open."""
        stream = self.stub.WatchCheckpoints(pb.WatchCheckpointsRequest(), metadata=shown(shown_))
        await stream.read()
        return stream


@contextlib.asynccontextmanager
async def taking(issuer: Issuer, folder: Path, **settings: Any) -> AsyncIterator[Asked]:
    """A server that takes an issuer's tokens, for the body of the `async with`."""
    folder.mkdir(exist_ok=True)
    keys = KeyFile(folder / "keys.json")
    key = keys.create("alice").text
    given = {"keys_file": str(keys.path), **issuer.settings(**settings)}
    server = checkpoint(folder, **given)
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        yield Asked(CheckpointServiceStub(channel), key)
    await server.stop()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
async def test_a_token_is_as_good_as_a_key(issuer: Issuer, tmp_path: Path, algorithm: str) -> None:
    """Of whichever kind the issuer's keys are; the key beside it goes on."""
    issuer.published = [jwk("other"), jwk("first", algorithm)]
    async with taking(issuer, tmp_path) as asked:
        assert await asked.reason(issuer.token(algorithm=algorithm)) == GOOD
        assert await asked.reason(issuer.token(algorithm=algorithm, aud=["x", "tinsmith"])) == GOOD
        assert await asked.reason(asked.key) == GOOD
        assert await asked.reason("tml-" + "A" * 43) == "UNAUTHENTICATED"


async def test_what_is_wrong_with_a_token_is_said(issuer: Issuer, tmp_path: Path) -> None:
    """In a sentence, with nothing of the token in it; nobody is called whom it names."""
    issuer.published.append(jwk("curve", "ES256"))
    good = issuer.token()
    head, body, signature = good.split(".")
    now_s = issuer.claims()["iat"]
    with Issuer() as stranger:
        there = {"jku": f"{stranger.url}{KEYS_PATH}", "x5u": f"{stranger.url}/x", "kid": "stranger"}
        wrong = {
            issuer.token(exp=now_s - 1): "has expired",
            issuer.token(exp=now_s - 1, key="unknown"): "has expired",
            issuer.token(nbf=now_s + 100): "not good yet",
            issuer.token(iat=now_s + 100): "not good yet",
            issuer.token(exp=now_s + 10**6): "longer than oidc_lifetime_s_max",
            issuer.token(exp=10**300): "longer than oidc_lifetime_s_max",
            issuer.token(exp=None): "no claim exp",
            issuer.token(exp="never"): "damaged",
            issuer.token(aud="other"): "not for the audience tinsmith",
            issuer.token(aud=["other", "tins"]): "not for the audience tinsmith",
            issuer.token(aud=None): "no claim aud",
            issuer.token(iss=f"{issuer.url}/"): "another issuer",
            issuer.token(iss=None): "another issuer",
            issuer.token(subject=""): "no text as its claim sub",
            issuer.token(sub=None): "no text as its claim sub",
            issuer.token(key="unknown"): "does not publish",
            issuer.token(key="second", header={"kid": "first"}): "not signed by the key",
            issuer.token(header={"kid": "curve"}): "does not publish",
            unsigned({"alg": "RS256", "kid": "first", "crit": ["exp"]}, issuer.claims()): "header",
            issuer.token(header={"jwk": jwk("second")}, key="second"): "does not publish",
            issuer.token(key="second", header=there): "does not publish",
            issuer.confused(): "another algorithm",
            unsigned({"alg": "none"}, issuer.claims()): "another algorithm",
            unsigned({"alg": "None", "kid": "first"}, issuer.claims()): "another algorithm",
            unsigned({"alg": ["RS256"], "kid": "first"}, issuer.claims()): "another algorithm",
            unsigned({"alg": "RS256", "kid": ["first"]}, issuer.claims()): "header",
            f"{head}.{body}.": "not signed by the key",
            f"{head}.{body}.{signature[:-4]}AAAA": "not signed by the key",
            f"{head}.{body}.{signature}=": "not signed by the key",
            f"{head}.{body}.{signature}.{signature}": "neither a key nor a token",
            f"{head}.{body}": "neither a key nor a token",
            f"{head}.e30.{signature}": "another issuer",
            "eyJ.eyJ.eyJ": "is no token",
            f"{head}.W10.": "is no token",
            "eyJ" + "A" * CHARACTERS_MAX: "longer than 6144 characters",
            good + "A" * 6000: "longer than 6144 characters",
        }
        async with taking(issuer, tmp_path) as asked:
            assert await asked.reason(good) == GOOD
            for token, words in wrong.items():
                reason, said = await asked.ask(token)
                assert reason == "UNAUTHENTICATED", (words, said)
                assert words in said
                assert token not in said
            assert await asked.reason(good) == GOOD
        assert not stranger.asked


@pytest.mark.parametrize("text", ["eyJ" + "W" * 3000, "eyJhIjpb" + "W1tb" * 700, "eyJ", "eyJ.."])
async def test_what_begins_like_a_token_is_refused(
    issuer: Issuer, tmp_path: Path, text: str
) -> None:
    """However deep what it would be."""
    async with taking(issuer, tmp_path) as asked:
        for shape in (text, f"{text}.{text}."):
            assert await asked.reason(shape) == "UNAUTHENTICATED"


# --- the issuer's keys ----------------------------------------------------------------------------


async def test_a_new_key_of_the_issuer_is_found_at_once(issuer: Issuer, tmp_path: Path) -> None:
    """By one fetch, however many show it together."""
    async with taking(issuer, tmp_path) as asked:
        assert await asked.reason(issuer.token()) == GOOD
        issuer.published.append(jwk("second"))
        before = issuer.asked[KEYS_PATH]
        tokens = [issuer.token(f"user-{number}", key="second") for number in range(50)]
        assert set(await asyncio.gather(*map(asked.reason, tokens))) == {GOOD}
        # Those that came once a fetch had begun waited for another one.
        assert before < issuer.asked[KEYS_PATH] <= before + 2


async def test_a_key_that_is_taken_away_is_good_no_more(issuer: Issuer, tmp_path: Path) -> None:
    """Its tokens are refused and their streams end; those of the next key go on."""
    issuer.published.append(jwk("second"))
    async with taking(issuer, tmp_path, oidc_refresh_s=0.1) as asked:
        old, new = issuer.token(), issuer.token(key="second")
        streams = [await asked.watching(each) for each in (old, new)]
        issuer.published.pop(0)
        await asked.until(old, "UNAUTHENTICATED")
        await until(streams[0].done)
        assert await streams[0].code() is grpc.StatusCode.UNAUTHENTICATED
        assert await asked.reason(new) == GOOD
        assert not streams[1].done()
        streams[1].cancel()


async def test_a_key_of_the_same_name_is_another_one(issuer: Issuer, tmp_path: Path) -> None:
    """Its tokens are not taken for those of the one before."""
    async with taking(issuer, tmp_path, oidc_refresh_s=0.1) as asked:
        old = issuer.token()
        assert await asked.reason(old) == GOOD
        issuer.published = [jwk("second", kid="first")]
        await asked.until(old, "UNAUTHENTICATED")
        assert await asked.reason(issuer.token(key="second", header={"kid": "first"})) == GOOD


async def test_an_issuer_that_is_away_holds_nobody_up(tmp_path: Path) -> None:
    """Who shows a key is served; who shows a token is told when to come again, and served once the
    issuer is there."""
    with Issuer(port=free_ports()) as issuer:  # nobody is given that port meanwhile
        pass
    async with taking(issuer, tmp_path) as asked:
        assert await asked.reason(issuer.token()) == "ISSUER_UNAVAILABLE"
        assert await asked.reason(asked.key) == GOOD
        with Issuer(port=issuer.port):
            await asked.until(issuer.token(), GOOD)


async def test_an_issuer_that_hangs_holds_nobody_up(issuer: Issuer, tmp_path: Path) -> None:
    """While a token waits for its keys, keys are served, and health is answered."""
    issuer.answers.clear()
    async with taking(issuer, tmp_path, oidc_timeout_s=1.0) as asked:
        waiting = asyncio.create_task(asked.reason(issuer.token()))
        await until(lambda: issuer.asked[CONFIGURATION])
        for _ in range(20):
            assert await asked.reason(asked.key) == GOOD
        assert await waiting == "ISSUER_UNAVAILABLE"
        issuer.answers.set()
        await asked.until(issuer.token(), GOOD)


async def test_an_issuer_whose_answer_never_ends_is_asked_anew(
    issuer: Issuer, tmp_path: Path
) -> None:
    """What comes of it byte by byte is given up, and holds no later question up."""
    issuer.drips.set()
    async with taking(issuer, tmp_path, oidc_timeout_s=0.5) as asked:
        assert await asked.reason(issuer.token()) == "ISSUER_UNAVAILABLE"
        issuer.drips.clear()  # answers that have begun go on
        await asked.until(issuer.token(), GOOD)


@pytest.mark.parametrize("how", ["hangs", "is gone", "answers 500", "has no key", "is no JSON"])
async def test_keys_that_are_known_stay_good(issuer: Issuer, tmp_path: Path, how: str) -> None:
    """Whatever becomes of the issuer; and so do tokens that nobody has shown yet."""
    settings = {"oidc_refresh_s": 0.02, "oidc_timeout_s": 0.1}
    async with taking(issuer, tmp_path, **settings) as asked:
        await asked.until(issuer.token(), GOOD)  # a fetch may take longer than that
        fetched = issuer.asked[CONFIGURATION]
        if how == "hangs":
            issuer.answers.clear()
        elif how == "is gone":
            issuer.stop()
        else:
            pages = {"answers 500": (500, b""), "has no key": (200, b'{"keys": []}')}
            status, body = pages.get(how, (200, b"<html>"))
            issuer.pages[KEYS_PATH] = (status, {}, body)
        for number in range(20):
            assert await asked.reason(issuer.token(f"user-{number}")) == GOOD
            await asyncio.sleep(0.02)
        await until(lambda: issuer.asked[CONFIGURATION] > fetched or how == "is gone")


@pytest.mark.parametrize(
    ("path", "page"),
    [
        (CONFIGURATION, {"issuer": "https://localhost", "jwks_uri": "HERE/keys"}),
        (CONFIGURATION, {"issuer": "HERE/", "jwks_uri": "HERE/keys"}),
        (CONFIGURATION, {"issuer": "HERE", "jwks_uri": "THERE/keys"}),
        (CONFIGURATION, {"issuer": "HERE", "jwks_uri": "file:///etc/passwd"}),
        (CONFIGURATION, {"issuer": "HERE", "jwks_uri": 3}),
        (CONFIGURATION, {"issuer": "HERE"}),
        (CONFIGURATION, ["HERE"]),
        (KEYS_PATH, {"keys": {"kid": "first"}}),
        (
            KEYS_PATH,
            {"keys": ["first", {"kty": "RSA"}, {"kty": ["RSA"]}, {"kty": "oct", "k": "x"}]},
        ),
        (KEYS_PATH, "x" * 600_000),
        (KEYS_PATH, "-> THERE/keys"),
    ],
)
async def test_an_issuer_that_says_something_else_is_not_believed(
    issuer: Issuer, tmp_path: Path, path: str, page: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Nor is anybody called whom it names, by a redirect either; the log says why."""
    with Issuer() as stranger:
        text = json.dumps(page).replace("THERE", stranger.url).replace("HERE", issuer.url)
        issuer.pages[path] = (200, {}, text.encode())
        if isinstance(page, str) and page.startswith("->"):
            issuer.pages[path] = (302, {"Location": f"{stranger.url}/keys"}, b"")
        async with taking(issuer, tmp_path) as asked:
            reason, said = await asked.ask(issuer.token())
            assert reason == "ISSUER_UNAVAILABLE"
            assert "http" not in said  # callers need not know
        assert not stranger.asked
    assert f"no keys of {issuer.url} for tokens, none known: " in caplog.text


async def test_keys_on_another_host_are_fetched_where_the_setting_says(
    issuer: Issuer, tmp_path: Path
) -> None:
    """As some issuers have them."""
    with Issuer() as elsewhere:
        url = f"{elsewhere.url}{KEYS_PATH}"
        async with taking(issuer, tmp_path, oidc_jwks_url=url) as asked:
            assert await asked.reason(issuer.token()) == GOOD
        assert not issuer.asked


async def test_the_issuer_shows_a_certificate_that_is_vouched_for(tmp_path: Path) -> None:
    """By the authorities of the setting, or else of this machine."""
    certificate = Issued(tmp_path / "issuer")
    with Issuer(certificate) as issuer:
        ca = str(certificate.ca)
        async with taking(issuer, tmp_path / "with", oidc_ca_file=ca) as asked:
            assert await asked.reason(issuer.token()) == GOOD
        asked_before = issuer.asked.total()
        async with taking(issuer, tmp_path / "without") as asked:
            assert await asked.reason(issuer.token()) == "ISSUER_UNAVAILABLE"
        assert issuer.asked.total() == asked_before


async def test_few_wait_for_an_issuer_at_once(
    issuer: Issuer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Strangers' tokens hold no more than that; the rest come again."""
    monkeypatch.setattr(fetching, "WAITING_MAX", 3)
    async with taking(issuer, tmp_path, oidc_timeout_s=30.0) as asked:
        assert await asked.reason(issuer.token()) == GOOD
        issuer.answers.clear()
        tokens = [issuer.token(key="unknown", subject=str(number)) for number in range(10)]
        asking = [asyncio.create_task(asked.reason(token)) for token in tokens]
        await until(lambda: sum(task.done() for task in asking) == 7)
        assert await asked.reason(issuer.token("other")) == GOOD
        issuer.answers.set()
        reasons = sorted(await asyncio.gather(*asking))
        assert reasons == ["ISSUER_UNAVAILABLE"] * 7 + ["UNAUTHENTICATED"] * 3


# --- what a token is good for ---------------------------------------------------------------------


async def test_a_token_that_ends_ends_its_streams(issuer: Issuer, tmp_path: Path) -> None:
    """As a key that is revoked."""
    async with taking(issuer, tmp_path) as asked:
        assert await asked.reason(issuer.token()) == GOOD  # the keys are there, and a connection
        short = issuer.token(exp=issuer.claims()["iat"] + 4)
        ends, goes_on = await asked.watching(short), await asked.watching(issuer.token())
        await until(ends.done)
        assert await ends.code() is grpc.StatusCode.UNAUTHENTICATED
        assert (await asked.ask(short))[1].endswith("the token has expired")
        assert not goes_on.done()
        goes_on.cancel()


async def test_a_claim_says_what_a_token_is_for(issuer: Issuer, tmp_path: Path) -> None:
    """The most of what it has; nothing gives what servers may, and none is good for nothing."""
    scopes = {"readers": "read-only", "users": "tenant", "operators": "admin"}
    settings = {"oidc_scope_claim": "groups", "oidc_scopes": scopes}
    async with taking(issuer, tmp_path, **settings) as asked:
        path = "tinsmith://m/weights/none"
        found = {}
        for groups in ("readers", ["users"], "operators", ["readers", "users"], "users operators"):
            metadata = shown(issuer.token(groups=groups))
            codes = []
            for call, request in (
                (asked.stub.GetCheckpoint, pb.GetCheckpointRequest(checkpoint_path=path)),
                (asked.stub.DeleteCheckpoint, pb.DeleteCheckpointRequest(checkpoint_path=path)),
                (asked.stub.ReleaseModels, pb.ReleaseModelsRequest(model_ids=["m"])),
            ):
                try:
                    await call(request, metadata=metadata)
                    codes.append("OK")
                except grpc.aio.AioRpcError as refused:
                    codes.append(refused.code().name)
            found[str(groups)] = codes
        assert found["readers"] == ["NOT_FOUND", "PERMISSION_DENIED", "PERMISSION_DENIED"]
        assert found["['users']"] == ["NOT_FOUND", "NOT_FOUND", "PERMISSION_DENIED"]
        assert found["['readers', 'users']"] == found["['users']"]
        assert found["operators"] == ["NOT_FOUND", "NOT_FOUND", "OK"]
        assert found["users operators"] == found["operators"]
        for groups in ("server", ["strangers"], None, {"users": 1}, [["users"]], 3):
            assert await asked.reason(issuer.token(groups=groups)) == "PERMISSION_DENIED"
        speaks = (*shown(issuer.token(groups="operators")), ("tinsmith-owner", "alice"))
        request = pb.CheckpointServiceGetCapabilitiesRequest()
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await asked.stub.GetCapabilities(request, metadata=speaks)
        assert refused.value.code() is grpc.StatusCode.PERMISSION_DENIED


async def test_without_what_checks_tokens_a_server_does_not_start(
    issuer: Issuer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says what to install."""
    for name in [name for name in sys.modules if name.startswith("tinsmithd.oidc")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "jwt", None)
    with pytest.raises(ConfigError, match=r"checkpoint\.oidc_issuer: needs jwt: pip install 'tin"):
        async with taking(issuer, tmp_path):
            pass
