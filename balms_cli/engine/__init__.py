"""How anything is trained: one loop, its schedules, its device, its checkpoints and its run folder."""
