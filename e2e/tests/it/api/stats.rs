//! Stats where there are very many providers: their names are whatever callers write.

use anyhow::{Context as _, Result};
use oncegate_api::{reason, v1};
use tonic::Code;

use super::{Served, reason_of, seconds};
use crate::setup::{Ledger, on_each_ledger};

on_each_ledger!(more_providers_than_a_report_takes_are_refused_by_the_field_that_would_give_fewer);

/// One event of each of so many providers, with names of 60 bytes, that completed after a second.
async fn plant_providers(served: &Served, providers: usize) -> Result<()> {
    match &served.ledger {
        Ledger::Sqlite => {
            rusqlite::Connection::open(served.directory.path().join("oncegate.db"))?.execute_batch(&format!(
                "delete from payment_webhook_counts;
                with recursive n (n) as (select 1 union all select n + 1 from n where n < {providers})
                insert into payment_webhook_counts (tenant, provider, hour, completed)
                select 'default', printf('p%059d', n), 1728000000000000, 1 from n;
                delete from payment_webhook_timings;
                insert into payment_webhook_timings
                select tenant, provider, hour, 509, 1 from payment_webhook_counts",
            ))?;
        }
        Ledger::Postgres(database) => {
            let sql = format!(
                "delete from payment_webhook_counts;
                insert into payment_webhook_counts (slot, tenant, provider, hour, completed)
                select 1, 'default', 'p' || lpad(n::text, 59, '0'), to_timestamp(1728000000), 1
                from generate_series(1, {providers}) n;
                delete from payment_webhook_timings;
                insert into payment_webhook_timings
                select slot, tenant, provider, hour, '{{509}}', '{{1}}' from payment_webhook_counts",
            );
            sqlx::raw_sql(sqlx::AssertSqlSafe(sql)).execute(&mut database.connect().await?).await?;
        }
    }
    Ok(())
}

async fn more_providers_than_a_report_takes_are_refused_by_the_field_that_would_give_fewer(
    ledger: Ledger,
) -> Result<()> {
    let served = Served::start(ledger).await?;
    let one = format!("p{:059}", 7);
    let whole = v1::StatsRequest::default();
    let hourly = v1::StatsRequest { bucket_duration: seconds(3_600), ..whole.clone() };
    for (providers, told) in [
        (40_001, "more than 40000 counts"),
        // As many as there may be counts, and more than a client takes in one message.
        (40_000, "where 4194304 are permitted"),
    ] {
        plant_providers(&served, providers).await?;
        for (request, field) in [(&whole, "provider"), (&hourly, "bucket_duration")] {
            let status = served.client().stats(request.clone()).await.expect_err("too many providers");
            assert_eq!((status.code(), reason_of(&status).as_str()), (Code::InvalidArgument, reason::INVALID_FIELD));
            assert!(status.message().contains(field) && status.message().contains(told), "{status:?}");
            let narrower = v1::StatsRequest { provider: one.clone(), ..request.clone() };
            assert_eq!(served.client().stats(narrower).await?.into_inner().providers.len(), 1, "{providers}");
        }
    }
    plant_providers(&served, 10_000).await?;
    for request in [whole, hourly] {
        let stats = served.client().stats(request).await?.into_inner();
        assert_eq!(stats.providers.len(), 10_000);
        for of in stats.providers {
            let counts = of.counts.context("counts")?;
            assert_eq!(
                (counts.total, counts.processing_p50),
                (1, stats.total.as_ref().context("a total")?.processing_p50)
            );
        }
    }
    Ok(())
}
