"""The customers' KMSes: keys that are allowed, denied, out of reach, throttled, or all of that by turns."""

from __future__ import annotations

import asyncio
import enum
import random
from typing import Final

from keymanager.kms.base import (
    Classification,
    DenialReason,
    Destruction,
    GeneratedKek,
    Hold,
    KeyDescription,
    KeyState,
    KmsCall,
    KmsCallObserver,
    KmsError,
    Verdict,
    WrappedKek,
)
from shared.crypto.context import EncryptionContext
from shared.crypto.secret import SecretKey
from tests.simulation.loop import SimulatedLoop, current_process
from tests.simulation.network import Network

DEADLINE_S: Final = 0.6
"""Of one call, as `kms_deadline_s`."""


class Mood(enum.StrEnum):
    ALLOWS = "allows"
    DENIES = "denies"
    SILENT = "silent"
    """No answer at all: the call ends at its deadline."""
    BROKEN = "broken"
    """5xx, at once."""
    THROTTLES = "throttles"
    AMBIGUOUS = "ambiguous"
    FLAPS = "flaps"
    """Any of the above, by call."""
    FAILS = "fails"
    """Any of the above but a yes, by call: the customer has said no, and the KMS is not well."""


_SINGLE: Final = (Mood.ALLOWS, Mood.DENIES, Mood.SILENT, Mood.BROKEN, Mood.THROTTLES, Mood.AMBIGUOUS)
_VERDICTS: Final = {
    Mood.SILENT: Verdict.UNREACHABLE,
    Mood.BROKEN: Verdict.UNREACHABLE,
    Mood.THROTTLES: Verdict.THROTTLED,
    Mood.AMBIGUOUS: Verdict.AMBIGUOUS,
}


class SimulatedCmk:
    """One customer's key: the truth that the system has to follow."""

    def __init__(self, name: str, loop: SimulatedLoop, network: Network, rng: random.Random) -> None:
        self.name = name
        self.mood = Mood.ALLOWS
        self.no_yes_since_s: float | None = None
        """No call that reached the KMS from then on was, or could be, answered with yes."""
        self.last_yes_s = 0.0
        self.answers: list[tuple[float, str, Mood]] = []
        """(time, process, answer) of every probe, as the watcher heard it."""
        self._loop, self._network, self._rng = loop, network, rng
        self._blobs: dict[bytes, bytes] = {}

    def become(self, mood: Mood) -> None:
        self.mood = mood
        if mood in (Mood.ALLOWS, Mood.FLAPS):
            self.no_yes_since_s = None
        elif self.no_yes_since_s is None:
            self.no_yes_since_s = self._loop.time()

    def wrapped(self, secret: bytes) -> bytes:
        blob = f"{self.name}/{len(self._blobs)}".encode()
        self._blobs[blob] = secret
        return blob

    def opened(self, blob: bytes) -> bytes:
        return self._blobs[blob]

    async def call(self, *, probe: bool = False) -> None:
        """One request. Raises KmsError."""
        process = current_process()
        answer = await self._asked(process.name)
        if probe:
            self.answers.append((self._loop.time(), process.name, answer))
        if answer is Mood.ALLOWS:
            return
        if answer is Mood.DENIES:
            classification = Classification(Verdict.DENIED, DenialReason.DISABLED)
        else:
            classification = Classification(_VERDICTS[answer])
        raise KmsError(classification, operation="Decrypt", provider_code=answer.value)

    async def _asked(self, caller: str) -> Mood:
        heard: asyncio.Future[Mood] = asyncio.get_running_loop().create_future()

        def hear(answer: Mood) -> None:
            if not heard.done():
                heard.set_result(answer)

        def decide() -> None:
            answer = self.mood
            if answer is Mood.FLAPS:
                answer = self._rng.choice(_SINGLE)
            elif answer is Mood.FAILS:
                answer = self._rng.choice(_SINGLE[1:])
            if answer is Mood.ALLOWS:
                self.last_yes_s = self._loop.time()
            if answer is not Mood.SILENT:
                self._network.send(self.name, caller, lambda: hear(answer))

        self._network.send(caller, self.name, decide)
        try:
            async with asyncio.timeout(DEADLINE_S):
                return await heard
        except TimeoutError:
            return Mood.SILENT


class SimulatedProvider:
    """`KmsProvider` for one CMK."""

    def __init__(self, cmk: SimulatedCmk, observer: KmsCallObserver) -> None:
        self._cmk, self._observer = cmk, observer

    async def _call(self, operation: str, *, probe: bool = False) -> None:
        error: KmsError | None = None
        try:
            await self._cmk.call(probe=probe)
        except KmsError as caught:
            error = caught
            raise
        finally:
            self._observer(KmsCall(operation, None, 0.0, None, error))

    async def generate_kek(self, context: EncryptionContext) -> GeneratedKek:
        await self._call("GenerateDataKey")
        plaintext = SecretKey.generate()
        return GeneratedKek(plaintext, self._cmk.wrapped(bytes(plaintext.reveal())), "1")

    async def wrap(self, secret: SecretKey, context: EncryptionContext) -> WrappedKek:
        await self._call("Encrypt")
        return WrappedKek(self._cmk.wrapped(bytes(secret.reveal())), "1")

    async def unwrap(self, wrapped: bytes, context: EncryptionContext) -> SecretKey:
        await self._call("Decrypt", probe="keylake:canary-of" in context.pairs)
        return SecretKey(self._cmk.opened(wrapped))

    async def rewrap(self, wrapped: bytes, context: EncryptionContext, hold: Hold | None = None) -> WrappedKek:
        await self._call("ReEncrypt")
        return WrappedKek(wrapped, "1")

    async def describe(self) -> KeyDescription:
        await self._call("DescribeKey")
        return KeyDescription(self._cmk.name, KeyState.ENABLED, "1", None)

    async def destruction(self) -> Destruction:
        await self._call("DescribeKey")
        return Destruction(False, "the key is there")

    async def aclose(self) -> None:
        pass
