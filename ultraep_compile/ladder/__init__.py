"""The rungs below tracing: experts that no compiler can see are lifted from a recorded eager forward of their module."""
