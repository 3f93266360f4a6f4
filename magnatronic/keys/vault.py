"""The key store that machines share: HashiCorp Vault, or whatever speaks its HTTP API (OpenBao does).

In: Vault's address, a token, and the names of a transit key and a KV version 2 mount. Out: data keys. The transit
engine makes each data key and wraps it; the wrapped key lies in KV, and to unwrap it is one more call, which Vault
records in its audit log. A key is destroyed by deleting all versions of its entry; a mark remains, which is written
first, so that no crash in between turns a destroyed key into an unknown one.

    <mount>/<path>/subjects/<hash>    the key ids of a subject; the hash is Vault's HMAC of its name
    <mount>/<path>/keys/<id>          the wrapped key
    <mount>/<path>/destroyed/<id>     the mark of a destroyed key
"""

import time
from base64 import b64decode, b64encode
from collections.abc import Callable
from hashlib import sha256
from typing import Any, Final

import httpx

from magnatronic.keys.store import checked_name, new_key_id
from schemas.encryption import KEY_BYTES, KEY_ID
from schemas.errors import KeyStoreError

__all__ = ["VaultKeys"]

_RETRY: Final = frozenset({412, 429, 500, 502, 503, 504})
_WAITS_S: Final = (0.1, 0.4)
_RACES: Final = 10


class VaultKeys:
    """See :class:`magnatronic.keys.store.SubjectKeys`.

    ``transport`` replaces the network, ``sleep`` the wait before a call is made again.
    """

    def __init__(
        self,
        url: str,
        token: str,
        *,
        transit_mount: str = "transit",
        transit_key: str = "magnatronic",
        kv_mount: str = "secret",
        path: str = "magnatronic",
        namespace: str = "",
        timeout_s: float = 5.0,
        transport: httpx.BaseTransport | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.place = url.rstrip("/")
        headers = {"X-Vault-Token": token, "X-Vault-Request": "true"}
        if namespace:
            headers["X-Vault-Namespace"] = namespace
        self._client = httpx.Client(
            base_url=f"{self.place}/v1/", headers=headers, timeout=timeout_s, transport=transport
        )
        self._transit, self._key_name, self._kv, self._path = transit_mount, transit_key, kv_mount, path
        self._sleep = sleep

    def close(self) -> None:
        """Let go of the connections."""
        self._client.close()

    def key_for(self, subject: str) -> str:
        """See :meth:`magnatronic.keys.store.SubjectKeys.key_for`."""
        place = self._subject(checked_name(subject))
        for _ in range(_RACES):
            ids, version = self._ids(place)
            if ids and self._get(f"destroyed/{ids[-1]}") is None:
                return ids[-1]
            key_id = new_key_id()
            made = self._call("POST", f"{self._transit}/datakey/plaintext/{self._key_name}", {"bits": KEY_BYTES * 8})
            self._put(f"keys/{key_id}", {"wrapped": made["ciphertext"]}, 0)
            if self._put(place, {"ids": [*ids, key_id]}, version):
                return key_id
            self._delete(f"keys/{key_id}")  # another process was first
        raise KeyStoreError(f"{self.place}: other processes changed the same subject {_RACES} times", retryable=True)

    def ids_of(self, subject: str) -> tuple[str, ...]:
        """See :meth:`magnatronic.keys.store.SubjectKeys.ids_of`."""
        return tuple(self._ids(self._subject(checked_name(subject)))[0])

    def data_key(self, key_id: str) -> bytes | None:
        """See :meth:`schemas.encryption.KeyStore.data_key`."""
        found = self._get(self._key_place(key_id))
        if found is None:
            if self._get(f"destroyed/{key_id}") is not None:
                return None
            raise LookupError(f"{self.place} has no key {key_id}")
        said = {"ciphertext": found[0].get("wrapped", "")}
        opened = self._call("POST", f"{self._transit}/decrypt/{self._key_name}", said)
        key = b64decode(opened["plaintext"])
        if len(key) != KEY_BYTES:
            raise KeyStoreError(f"{self.place}: key {key_id} has {len(key)} bytes instead of {KEY_BYTES}")
        return key

    def destroy(self, key_id: str) -> bool:
        """See :meth:`magnatronic.keys.store.SubjectKeys.destroy`."""
        there = self._get(self._key_place(key_id)) is not None
        marked = self._get(f"destroyed/{key_id}") is not None
        if not there and not marked:
            raise LookupError(f"{self.place} has no key {key_id}")
        if not marked:
            self._put(f"destroyed/{key_id}", {"destroyed": True}, 0)
        self._delete(self._key_place(key_id))
        return there

    @staticmethod
    def _key_place(key_id: str) -> str:
        # Ids come from events, and are part of a path here.
        if not KEY_ID.fullmatch(key_id):
            raise LookupError(f"{key_id[:60]!r} is no key id")
        return f"keys/{key_id}"

    def _subject(self, name: bytes) -> str:
        # Always the first version of Vault's key: rotating it must not change where a subject is found.
        said = {"input": b64encode(name).decode(), "algorithm": "sha2-256", "key_version": 1}
        answer = self._call("POST", f"{self._transit}/hmac/{self._key_name}", said)
        return f"subjects/{sha256(str(answer['hmac']).encode()).hexdigest()}"

    def _ids(self, place: str) -> tuple[list[str], int]:
        found = self._get(place)
        return ([], 0) if found is None else (list(found[0].get("ids", ())), found[1])

    def _get(self, place: str) -> tuple[dict[str, Any], int] | None:
        """The entry and its version; None without one."""
        response = self._ask("GET", f"{self._kv}/data/{self._path}/{place}")
        if response.status_code == 404:
            return None
        data = self._checked(response)
        return data["data"], int(data["metadata"]["version"])

    def _put(self, place: str, data: dict[str, Any], version: int) -> bool:
        """Write the entry if its version is still ``version`` (0: there is none); whether it was."""
        said = {"options": {"cas": version}, "data": data}
        response = self._ask("POST", f"{self._kv}/data/{self._path}/{place}", said)
        if response.status_code == 400 and "check-and-set" in response.text:
            return False
        self._checked(response)
        return True

    def _delete(self, place: str) -> None:
        """Delete all versions of the entry."""
        response = self._ask("DELETE", f"{self._kv}/metadata/{self._path}/{place}")
        if response.status_code != 404:
            self._checked(response)

    def _call(self, method: str, path: str, said: dict[str, Any]) -> dict[str, Any]:
        return self._checked(self._ask(method, path, said))

    def _ask(self, method: str, path: str, said: dict[str, Any] | None = None) -> httpx.Response:
        """Vault's answer; asked again where that may help.

        Raises:
            KeyStoreError: there was none.
        """
        problem = ""
        for wait_s in (*_WAITS_S, None):
            try:
                response = self._client.request(method, path, json=said)
            except httpx.HTTPError as error:
                problem = f"{type(error).__name__}: {error}"
            else:
                if response.status_code not in _RETRY:
                    return response
                problem = f"HTTP {response.status_code}{_errors(response)}"
            if wait_s is not None:
                self._sleep(wait_s)
        hint = "; it may be sealed: unseal it" if "503" in problem else ""
        raise KeyStoreError(f"the key store {self.place} does not answer ({problem}){hint}", retryable=True)

    def _checked(self, response: httpx.Response) -> dict[str, Any]:
        request = f"{response.request.method} {response.request.url.path}"
        if response.status_code == 403:
            raise KeyStoreError(
                f"the key store {self.place} refuses {request}: MAGNATRONIC_VAULT_TOKEN is wrong or has expired, or "
                "its policy lacks this path (docs/privacy.md)"
            )
        if response.status_code == 404:
            raise KeyStoreError(
                f"the key store {self.place} has no {request}: enable transit and KV version 2, and make the transit "
                "key (docs/privacy.md)"
            )
        if response.is_error:
            raise KeyStoreError(
                f"the key store {self.place}: {request}: HTTP {response.status_code}{_errors(response)}"
            )
        if not response.content:
            return {}
        try:
            data: dict[str, Any] = response.json()["data"]
        except (ValueError, LookupError, TypeError) as error:
            raise KeyStoreError(f"the key store {self.place}: {request}: no answer of a Vault ({error})") from error
        return data


def _errors(response: httpx.Response) -> str:
    try:
        said = "; ".join(map(str, response.json()["errors"]))
    except (ValueError, LookupError, TypeError):
        return ""
    return f": {said[:300]}" if said else ""
