"""`pmi`: `continuation` minus the log-likelihood that the option has after BOS alone.

The fair score for small models, which rank options by how usual their wording is, whatever came before.
"""

from halve.measure.quality.protocols.choice_protocol import ChoiceProtocol

PMI = ChoiceProtocol("pmi", None, prior=True)
