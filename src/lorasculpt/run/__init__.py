"""What a run is made of, each from its :class:`~lorasculpt.config.RunConfig`; `lorasculpt.train` puts it together."""
