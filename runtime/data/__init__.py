"""From pictures to batches: decoded, encoded, cached, ordered and fed."""
