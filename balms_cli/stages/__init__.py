"""What each subcommand does: ``run(config, ...) -> Result``, usable from Python as it is."""
