"""Plain alternatives to this project, as others write them: what the job is measured against."""
