"""Recipe to plan: pure, quick, and without torch."""
