"""Where a run's result goes besides its folder: the hub, and whoever a webhook tells.

    published.json     what the hub has: the result's plan, and the steps of checkpoints

Everything happens in the background and is tried again; nothing here ever ends a run. What could
not be published is when the finished run is run again.
"""

from runtime.publish.publisher import Publisher

__all__ = ["Publisher"]
