"""Keys, their file, and the ring that looks them up."""

import hashlib
import stat
import threading

import msgspec
import pytest
from prometheus_client import CollectorRegistry

from services.gateway.access.figures import AccessFigures
from services.gateway.access.keyring import FileSource, Keyring
from shared.access import key_file
from shared.access.key import MAX_SECRET_CHARS, PREFIX, BadKey, Key, digest, new_id, new_secret
from shared.errors import KeysUnavailable, ModelNotFound, TierNotAllowed, Unauthorized

SECRET = new_secret()
GOOD = f"keys:\n- id: a\n  tenant: acme\n  hash: '{digest(SECRET)}'\n"


def key(name: str = "a", secret: str = SECRET, **more) -> Key:
    return Key(id=name, tenant="acme", hash=digest(secret), **more)


class Nowhere:
    """A source that is never asked."""

    name = "nowhere"

    async def look(self):
        raise NotImplementedError


def ring(keys) -> Keyring:
    return Keyring(Nowhere(), AccessFigures(CollectorRegistry()), keys)


def test_a_secret_is_256_random_bits_and_is_kept_as_their_hash():
    assert new_secret() != SECRET
    assert SECRET.startswith(PREFIX)
    assert len(SECRET) - len(PREFIX) == 43  # 32 bytes in base64
    assert digest(SECRET) == hashlib.sha256(SECRET.encode()).hexdigest()
    assert new_id() not in SECRET


def test_a_file_is_written_by_its_owner_only_and_read_back(tmp_path):
    path = tmp_path / "new" / "keys.yaml"
    wanted = [key(name="a", tiers=["flex"], models=["m"], tokens_per_minute=7), key("b", new_secret())]
    for one in wanted:
        key_file.change(path, lambda keys, one=one: [*keys, one])
    assert key_file.read(path) == wanted
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert SECRET not in path.read_text()
    key_file.change(path, lambda keys: keys[1:])
    assert [one.id for one in key_file.read(path)] == ["b"]
    assert sorted(one.name for one in path.parent.iterdir()) == [".keys.yaml.lock", "keys.yaml"]


def test_changes_side_by_side_lose_nothing(tmp_path):
    path = tmp_path / "keys.yaml"

    def add(number: int) -> None:
        key_file.change(path, lambda keys: [*keys, key(f"k{number}", f"s{number}")])

    threads = [threading.Thread(target=add, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {one.id for one in key_file.read(path)} == {f"k{number}" for number in range(12)}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("keys: [", "not valid YAML in line"),
        ("- a", "one mapping with `keys`"),
        ("keys: 3", "one mapping with `keys`"),
        ("keys: []\nmore: 1", "one mapping with `keys`"),
        ("keys:\n- 7", "entry 1: Expected `object`"),
        (GOOD + "- id: b\n  tenant: t\n", r"entry 2 \(b\): .*`hash`"),
        (GOOD + "  tiers: [fast]", r"entry 1 \(a\): .*tiers"),
        (GOOD + "  tiers: []", r"entry 1 \(a\): .*tiers"),
        (GOOD + "  requests_per_minute: -1", r"entry 1 \(a\): .*requests_per_minute"),
        (GOOD + "  tokens_per_minute: many", r"entry 1 \(a\): .*tokens_per_minute"),
        (GOOD + "  limit: 1", r"entry 1 \(a\): .*limit"),
        (GOOD.replace("acme", "a b"), r"entry 1 \(a\): .*tenant"),
        (GOOD + f"- id: a\n  tenant: t\n  hash: '{digest('x')}'", "key a: its id is there twice"),
        (GOOD + f"- id: b\n  tenant: t\n  hash: '{digest(SECRET)}'", "key b: its hash is there twice"),
    ],
)
def test_a_bad_file_names_the_entry(tmp_path, text, words):
    path = tmp_path / "keys.yaml"
    path.write_text(text)
    with pytest.raises(BadKey, match=words) as caught:
        key_file.read(path)
    assert SECRET not in str(caught.value)


def test_an_empty_file_has_no_keys(tmp_path):
    path = tmp_path / "keys.yaml"
    for text in ("", "keys:\n", "keys: []\n"):
        path.write_text(text)
        assert key_file.read(path) == []


def test_a_date_may_be_written_without_quotes(tmp_path):
    path = tmp_path / "keys.yaml"
    path.write_text(GOOD + "  created: 2026-01-02\n")
    assert str(key_file.read(path)[0].created) == "2026-01-02"


def test_who_may_come_in():
    keys = ring([key(requests_per_minute=3), key("b", "other", tokens_per_minute=9)])
    client = keys.client(f"Bearer {SECRET}".encode())
    assert (client.tenant, client.key_id, client.limits) == ("acme", "a", (3, 0))
    assert keys.client(f"bearer  {SECRET} ".encode()) == client
    assert SECRET not in repr(client)
    assert digest(SECRET) not in repr(client)


@pytest.mark.parametrize(
    "header",
    [
        "",
        "Bearer",
        "Bearer ",
        "Bearer nonsense",
        "Basic {key}",
        "{key}",
        "Bearer {key}x",
        "Bearer {hash}",
        "Bearer \xff",
    ],
)
def test_who_may_not(header):
    with pytest.raises(Unauthorized) as caught:
        ring([key()]).client(header.format(key=SECRET, hash=digest(SECRET)).encode("latin-1"))
    assert SECRET not in caught.value.message


def test_what_is_too_long_for_a_key_is_not_even_hashed():
    endless = "x" * (MAX_SECRET_CHARS + 1)
    with pytest.raises(Unauthorized):
        ring([key(secret=endless)]).client(f"Bearer {endless}".encode())


def test_before_any_key_is_known_nobody_is_told_that_his_is_wrong():
    with pytest.raises(KeysUnavailable):
        ring(None).client(f"Bearer {SECRET}".encode())
    with pytest.raises(Unauthorized):
        ring([]).client(f"Bearer {SECRET}".encode())


def test_tiers_and_models():
    client = ring([key(tiers=["flex"], models=["mine"])]).client(f"Bearer {SECRET}".encode())
    client.check(model="mine", tier="flex")
    with pytest.raises(ModelNotFound):
        client.check(model="other", tier="flex")
    with pytest.raises(TierNotAllowed, match="it may use: flex") as caught:
        client.check(model="mine", tier="default")
    assert caught.value.param == "service_tier"


async def test_a_file_is_looked_at_again_when_it_changes(tmp_path):
    path = tmp_path / "keys.yaml"
    path.write_text(GOOD)
    source = FileSource(path)
    assert [one.id for one in source.keys] == ["a"]
    assert await source.look() is None
    path.write_text("nonsense")
    for _ in range(2):
        with pytest.raises(BadKey):
            await source.look()
    path.write_text(GOOD.replace("id: a", "id: again"))
    assert [one.id for one in await source.look()] == ["again"]
    path.unlink()
    with pytest.raises(OSError):
        await source.look()


def test_an_entry_of_a_newer_version_is_not_taken_for_one_of_ours():
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert({"id": "a", "tenant": "t", "hash": digest("x"), "expires": 1}, Key)
