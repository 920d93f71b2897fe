"""English function words: they say nothing about what a document is about."""

from __future__ import annotations

_WORDS = """
a about above across after again against ago all almost alone along already also although always
am among amongst an and another any anybody anyone anything anywhere are around as at away be
became because become becomes been before beforehand behind being below beside besides between
beyond both but by can cannot could d did do does doing done down during each either else
elsewhere enough etc even ever every everybody everyone everything everywhere except few for from
further had has have having he hence her here hereby herein hers herself him himself his how
however i if in indeed instead into is it its itself just least less let ll lot m many may maybe
me meanwhile might mine more moreover most mostly much must my myself namely near neither never
nevertheless no nobody none nor not nothing now nowhere of off often on once one ones only onto or
other others otherwise ought our ours ourselves out over own per perhaps quite rather re really s
same several shall she should since so some somebody somehow someone something sometimes somewhere
still such t than that the their theirs them themselves then thence there thereby therefore
therein these they this those though through throughout thus to together too toward towards under
unless until up upon us ve very via was we well were what whatever when whence whenever where
whereas whereby wherein wherever whether which while who whoever whole whom whose why will with
within without would yet you your yours yourself yourselves
"""
STOPWORDS = frozenset(_WORDS.split())
