"""What several folders' tests share: processes, servers, waiting."""
