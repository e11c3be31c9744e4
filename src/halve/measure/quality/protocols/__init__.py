"""How a question is asked and its answer taken: a file per protocol, an entry in PROTOCOLS."""

from halve.measure.quality.protocols.choice_protocol import ChoiceProtocol
from halve.measure.quality.protocols.continuation import CONTINUATION
from halve.measure.quality.protocols.generate import GENERATE
from halve.measure.quality.protocols.letter import LETTER
from halve.measure.quality.protocols.pmi import PMI

# By name, the default first. A study may hand in a protocol of its own, which is no entry here.
PROTOCOLS: dict[str, ChoiceProtocol] = {protocol.name: protocol for protocol in (LETTER, CONTINUATION, PMI, GENERATE)}
