"""The paper's claims as commands: accuracy, conditioning and cost, each figure beside what the paper says."""
