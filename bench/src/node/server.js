// One process, as the first version ran: verify, ask Redis, lock in Redis for five minutes, insert, complete by an update, tell
// Redis, unlock. With what was unsafe in it: Redis decides, the lock names no owner, and whoever comes second is told 200.
import crypto from "node:crypto";
import express from "express";
import Redis from "ioredis";
import pg from "pg";

const redis = new Redis({ host: "127.0.0.1", port: Number(process.env.REDIS_PORT), keyPrefix: "first:" });
const pool = new pg.Pool({ connectionString: process.env.DATABASE_URL, max: 20 });
const secret = process.env.STRIPE_WEBHOOK_SECRET;
const WEEK = 7 * 24 * 3600;
const LOCK = 300;

function isGenuine(header, body) {
  const fields = Object.fromEntries((header ?? "").split(",").map((field) => field.split("=", 2)));
  const expected = crypto.createHmac("sha256", secret).update(`${fields.t}.`).update(body).digest();
  const given = Buffer.from(fields.v1 ?? "", "hex");
  return given.length === expected.length && crypto.timingSafeEqual(given, expected);
}

const app = express();
app.disable("x-powered-by");
app.post("/webhooks/payments/stripe", express.raw({ type: "*/*", limit: "256kb" }), async (request, response) => {
  if (!isGenuine(request.get("stripe-signature"), request.body)) {
    return response.status(401).json({ status: "unauthorized" });
  }
  const event = JSON.parse(request.body.toString("utf8"));
  const key = `stripe:${event.id}`;
  if ((await redis.get(key)) === "completed") {
    return response.json({ status: "already_processed" });
  }
  if ((await redis.set(`lock:${key}`, "1", "EX", LOCK, "NX")) === null) {
    return response.json({ status: "in_progress" });
  }
  const inserted = await pool.query(
    `insert into payment_webhook_events (event_id, provider, event_type, status)
     values ($1, 'stripe', $2, 'processing') on conflict (provider, event_id) do nothing returning id`,
    [event.id, event.type],
  );
  if (inserted.rowCount === 0) {
    const found = await pool.query(
      `select status from payment_webhook_events where provider = 'stripe' and event_id = $1`,
      [event.id],
    );
    if (found.rows[0]?.status === "completed") {
      return response.json({ status: "already_processed" });
    }
  }
  await pool.query(
    `update payment_webhook_events set status = 'completed', processed_at = now(), updated_at = now()
     where provider = 'stripe' and event_id = $1`,
    [event.id],
  );
  await redis.set(key, "completed", "EX", WEEK);
  await redis.del(`lock:${key}`);
  response.json({ status: "processed" });
});
app.use((error, _request, response, _next) => response.status(500).json({ status: "failed", error: error.message }));
app.listen(Number(process.env.PORT), "127.0.0.1");
