"""What a person looks at: a run's page, `report.html`, made from the files of its folder and nothing else."""
