-- The dearest tasks: tokens and US dollars
SELECT task_id, status, llm_calls, tokens, round(cost_usd, 6) AS cost_usd, duration_ms, objective
FROM tasks
ORDER BY tasks.cost_usd DESC, tokens DESC, task_id
LIMIT 20
