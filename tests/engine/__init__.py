import springtide.engine  # noqa: F401  before torch, whose threads it sets up
