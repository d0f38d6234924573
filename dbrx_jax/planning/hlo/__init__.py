"""Analysis of optimised HLO text (``compiled.as_text()``): memory traffic, temporaries and collectives.

Bytes are those of the elements, without the padding of a TPU's tiles. XLA's ``cost_analysis()`` differs: it counts
loops once and moves between memories several times.
"""

from dbrx_jax.planning.hlo.collectives import Collective as Collective
from dbrx_jax.planning.hlo.collectives import bytes_moved as bytes_moved
from dbrx_jax.planning.hlo.collectives import collectives as collectives
from dbrx_jax.planning.hlo.launches import Launch as Launch
from dbrx_jax.planning.hlo.launches import launches as launches
from dbrx_jax.planning.hlo.traffic import Temporary as Temporary
from dbrx_jax.planning.hlo.traffic import Traffic as Traffic
from dbrx_jax.planning.hlo.traffic import hbm_traffic as hbm_traffic
from dbrx_jax.planning.hlo.traffic import largest_temporaries as largest_temporaries
