-- Calls, tokens, US dollars and latency by provider and model
SELECT
    provider,
    model,
    count() AS calls,
    countIf(error != '') AS failed,
    sum(prompt_tokens) AS prompt_tokens,
    sum(completion_tokens) AS completion_tokens,
    round(sum(cost_usd), 6) AS cost_usd,
    round(quantileExact(0.5)(latency_ms), 1) AS p50_ms,
    round(quantileExact(0.99)(latency_ms), 1) AS p99_ms
FROM llm_calls
GROUP BY provider, model
ORDER BY cost_usd DESC, calls DESC
