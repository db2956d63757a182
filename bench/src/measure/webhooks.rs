//! Gateway and sidecar in one process, over HTTP with signatures.

use anyhow::Result;

use super::Bench;
use crate::{node, process::note};

impl Bench<'_> {
    /// P8.
    pub(super) fn webhook_duplicates(&mut self) -> Result<()> {
        let world = self.world;
        world.postgres.create("webhooks")?;
        let bare = world.bare("bare-hyper")?;
        let all = world.all("webhooks", &[])?;
        let values = self.alternate(&mut [
            ("duplicates c=64", Box::new(|| Ok(world.load_http(&all, "duplicates", 64)?.main.per_second))),
            ("bare hyper c=64", Box::new(|| world.bare_rate(&bare, 64, "http"))),
        ])?;
        self.ratio("P8", values[0], values[1], "/s");
        Ok(())
    }

    /// P7 and P9.
    pub(super) fn first_version(&mut self) -> Result<()> {
        let world = self.world;
        if !world.options.with_node {
            note("  P7 and P9 are not measured without --with-node");
            return Ok(());
        }
        world.postgres.create("webhooks")?;
        world.postgres.create("first")?;
        let first = node::start(world, "first")?;
        let all = world.all("webhooks", &[])?;
        if self.wants("P7") {
            let cycle = |server| Ok(world.load_http(server, "cycle", 64)?.main.per_second);
            let values = self.alternate(&mut [
                ("new events c=64", Box::new(|| cycle(&all))),
                ("first version c=64", Box::new(|| cycle(&first))),
            ])?;
            self.ratio("P7", values[0], values[1], "/s");
        }
        if self.wants("P9") {
            let p50 = |server, workload| Ok(world.load_http(server, workload, 1)?.main.p50_ms);
            let values = self.alternate(&mut [
                ("new event c=1, p50 ms", Box::new(|| p50(&all, "cycle"))),
                ("first version", Box::new(|| p50(&first, "cycle"))),
                ("duplicate c=1, p50 ms", Box::new(|| p50(&all, "duplicates"))),
                ("first version", Box::new(|| p50(&first, "duplicates"))),
            ])?;
            self.ratio("P9a", values[0], values[1], "ms");
            self.ratio("P9b", values[2], values[3], "ms");
        }
        Ok(())
    }
}
