//! What the sidecar keeps in memory.

use anyhow::Result;

use super::Bench;

/// Enough that the cost of each is measured, rather than what a process needs anyway.
const KEYS: u64 = 300_000;

impl Bench<'_> {
    /// P10.
    pub(super) fn memory(&mut self) -> Result<()> {
        const MIB: f64 = 1024.0 * 1024.0;
        let world = self.world;
        let (mut idle, mut loaded, mut per_key) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..world.options.runs.min(3) {
            world.postgres.create("memory")?;
            let sidecar = world.sidecar("memory", &[("CACHE_SIZE", "0B")])?;
            std::thread::sleep(std::time::Duration::from_secs(2));
            idle.push(sidecar.resident_bytes()? as f64 / MIB);
            world.rate(&sidecar, "cycle", 1_024, &[])?;
            loaded.push(sidecar.resident_bytes()? as f64 / MIB);

            // The same events through a process whose cache has room for them, and through one without a cache: the
            // difference is the cache.
            let resident = |cache: &str| -> Result<f64> {
                let sidecar = world.sidecar("memory", &[("CACHE_SIZE", cache)])?;
                world.complete(&sidecar, KEYS)?;
                Ok(sidecar.resident_bytes()? as f64)
            };
            let (with, without) = (resident("80MiB")?, resident("0B")?);
            per_key.push((with - without) / KEYS as f64);
        }
        self.keep_median("P10a", &idle);
        self.keep_median("P10b", &loaded);
        self.keep_median("P10c", &per_key);
        Ok(())
    }
}
