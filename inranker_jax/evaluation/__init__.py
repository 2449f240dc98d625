"""From runs to reports: measures, reranking, tables. `measures` and `significance` see plain values only."""
