"""What judges the protected model: audit, reproduction, benchmark, tasks, demo; one toolkit for their reports."""
