//! `oncegate dev`: everything in one process, nothing to install, and a webhook to see it work.

mod application;
pub(crate) mod certificate;
mod demonstration;
pub(crate) mod file;

use std::{
    env, fs, io, iter,
    net::SocketAddr,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};
use clap::builder::Resettable;
use oncegate_api::v1::idempotency_service_client::IdempotencyServiceClient;
use oncegate_gateway::config::{Environment, FlutterwaveVersion};
use oncegate_runtime::{
    config::{Problem, Problems},
    shutdown::{self, CancellationToken},
};
use tempfile::TempDir;
use tokio::sync::mpsc;

use self::{application::Delivery, file::DevFile};
use crate::{
    all::{both, serve_both, within},
    failure::Failure,
    output, service,
};

/// Try it out: everything in one process, on an embedded store
///
/// Starts a sidecar, a gateway and a small application behind it, with secrets that it makes up, sends itself a
/// genuinely signed webhook of each provider twice, shows what was delivered and what was answered as a duplicate, and
/// serves until Ctrl-C. The events are kept in ./oncegate.db, the secrets in ./.oncegate-dev.json, readable by their owner alone,
/// where `oncegate simulate` in another terminal finds them.
///
/// The listeners are open to this machine only, and an address that is open to others is refused. Not for production: that is `oncegate all`, or `sidecar` and `gateway`.
#[derive(clap::Args, Debug)]
#[command(after_long_help = "\
Examples:
  oncegate dev
  oncegate dev --once
  oncegate dev --gateway-listen 127.0.0.1:0 --sidecar-listen 127.0.0.1:0 --application-listen 127.0.0.1:0")]
pub(crate) struct Dev {
    /// End after the table: with 0, or with 1 if anything was not as it should be
    #[arg(long)]
    once: bool,

    /// Where to keep the events
    #[arg(long, default_value = "./oncegate.db", value_name = "FILE")]
    database: PathBuf,

    /// Where the gateway listens; port 0 is any free one
    #[arg(long, env = "GATEWAY_LISTEN", default_value = "127.0.0.1:8080", value_name = "ADDRESS")]
    gateway_listen: SocketAddr,

    /// Where the sidecar listens
    #[arg(long, env = "SIDECAR_LISTEN", default_value = "127.0.0.1:50051", value_name = "ADDRESS")]
    sidecar_listen: SocketAddr,

    /// Where the application of `dev` listens
    #[arg(long, env = "APPLICATION_LISTEN", default_value = "127.0.0.1:8081", value_name = "ADDRESS")]
    application_listen: SocketAddr,

    /// Not used, so that nobody's own database gets events made up: `dev` says so where it is set
    #[arg(long, env = "DATABASE_URL", hide = true, hide_env_values = true)]
    database_url: Option<oncegate_runtime::secret::SecretText>,
}

impl Dev {
    pub(crate) async fn run(self) -> Result<(), Failure> {
        if self.database_url.is_some() {
            output::line(
                "DATABASE_URL is set and not used: dev keeps its events in an embedded store (see --database)",
            );
        }
        if let Some(problems) = self.open_listeners() {
            return Err(problems.into());
        }
        let signal = shutdown::on_signals().context("cannot listen for signals")?;
        let directory = env::current_dir().context("cannot find the current directory")?;
        let mut dev_file = DevFile::read(&directory)?.unwrap_or_default();

        let application = service::bind("APPLICATION_LISTEN", self.application_listen).await?;
        let application_address = application.local_addr().context("a bound listener has no address")?;
        let files = private_directory().context("cannot make a temporary directory")?;
        let gateway_options = self.gateway_options(application_address, &mut dev_file, files.path())?;
        let (sidecar, gateway) = both(self.sidecar_options().validate(), gateway_options.validate())?;
        let sidecar = oncegate_sidecar::Sidecar::start(sidecar).await?;
        let gateway = oncegate_gateway::Gateway::bind(gateway, within(&sidecar)).await?;
        let gateway_url = format!("http://{}", gateway.local_addr());
        // In the same process, without a socket, as for the gateway.
        let client = IdempotencyServiceClient::new(sidecar.service());

        // Written only after everything is bound: a second `dev` that finds its ports in use must not replace the file of the
        // first.
        dev_file.gateway = Some(gateway_url.clone());
        dev_file.sidecar = sidecar.local_addr().map(|address| format!("http://{address}"));
        dev_file.write(&directory)?;

        let (deliver, mut deliveries) = mpsc::unbounded_channel();
        let stop = CancellationToken::new();
        let application_stop = CancellationToken::new();
        let application = tokio::spawn(application::run(application, deliver, application_stop.clone()));
        let services = tokio::spawn(serve_both(sidecar, gateway, stop.clone()));

        self.introduce(&dev_file, application_address);
        let shown = demonstration::run(&gateway_url, &dev_file, &mut deliveries, async |request| {
            Ok(client.clone().history(request).await.context("cannot ask the sidecar")?.into_inner())
        })
        .await;
        if shown.is_ok() && !self.once {
            what_next(&dev_file);
            serve(&mut deliveries, &signal, &services).await;
        }

        stop.cancel();
        let served = services.await.context("the services failed")?;
        application_stop.cancel();
        let _ = application.await;
        served?;
        shown
    }

    /// Problems with settings that would let others connect, who could forge payments with made-up secrets that lie around.
    /// They may come from the environment, where they are meant for the services in production.
    fn open_listeners(&self) -> Option<Problems> {
        let listeners = [
            ("GATEWAY_LISTEN", "--gateway-listen 127.0.0.1:8080", self.gateway_listen),
            ("SIDECAR_LISTEN", "--sidecar-listen 127.0.0.1:50051", self.sidecar_listen),
            ("APPLICATION_LISTEN", "--application-listen 127.0.0.1:8081", self.application_listen),
        ];
        let open = listeners.into_iter().filter(|(_, _, address)| !address.ip().is_loopback());
        let problems = open.map(|(setting, instead, address)| {
            let text = format!("{address} is open to other machines, and dev is not: unset it, or give {instead}");
            Problems::from(Problem::new(setting, text))
        });
        problems.reduce(Problems::and)
    }

    fn sidecar_options(&self) -> oncegate_sidecar::config::Options {
        oncegate_sidecar::config::Options {
            sidecar_listen: self.sidecar_listen.into(),
            store: oncegate_sidecar::config::StoreOptions {
                database_url: None,
                database_url_file: None,
                store: Some(self.database.clone()),
            },
            ..defaults()
        }
    }

    /// A route for each provider, with secrets made up where there are none yet.
    fn gateway_options(
        &self,
        application: SocketAddr,
        secrets: &mut DevFile,
        files: &Path,
    ) -> Result<oncegate_gateway::config::Options> {
        let roots = secrets.paypal_or_new()?.write(files)?;
        // Standard Webhooks have no settings of their own: users tend to have several, in a file.
        let config = files.join("routes.toml");
        let secret = secrets.secret_or_new("standard_webhooks", "whsec_");
        let routes = format!(
            "[[route]]\nname = \"standard_webhooks\"\nprovider = \"standard_webhooks\"\nsecrets = \"{secret}\"\n"
        );
        fs::write(&config, routes).with_context(|| format!("cannot write {}", config.display()))?;
        let mut secret = |provider, prefix| Some(secrets.secret_or_new(provider, prefix).into());
        Ok(oncegate_gateway::config::Options {
            gateway_listen: self.gateway_listen,
            upstream_url: Some(format!("http://{application}/")),
            config: Some(config),
            stripe_webhook_secret: secret("stripe", "whsec_"),
            paypal_webhook_id: secret("paypal", ""),
            paypal_environment: Environment::Sandbox,
            paypal_cert_dir: Some(files.to_owned()),
            paypal_trust_anchors_file: Some(roots),
            flutterwave_webhook_secret: secret("flutterwave", ""),
            flutterwave_signature: Some(FlutterwaveVersion::V4),
            paystack_webhook_secret: secret("paystack", "sk_test_"),
            gateway_holder: "dev".into(),
            ..defaults()
        })
    }

    fn introduce(&self, file: &DevFile, application: SocketAddr) {
        let address = |address: &Option<String>| address.clone().unwrap_or_default();
        output::line(format_args!("gateway      {}", address(&file.gateway)));
        output::line(format_args!("sidecar      {}", address(&file.sidecar)));
        output::line(format_args!("application  http://{application}  (GET / lists what it got)"));
        output::line(format_args!("events in    {}", self.database.display()));
        output::line(format_args!("secrets in   ./{}", file::NAME));
        output::line("");
    }
}

/// For the files that the gateway reads. Nobody else may read them: they hold a secret.
fn private_directory() -> io::Result<TempDir> {
    tempfile::Builder::new().permissions(fs::Permissions::from_mode(0o700)).tempdir()
}

/// Options with the documented defaults, ignoring the environment, which is meant for the services in production.
fn defaults<T: clap::Args>() -> T {
    let command = T::augment_args(clap::Command::new("dev").no_binary_name(true))
        .mut_args(|argument| argument.env(Resettable::Reset));
    let matches = command.get_matches_from(iter::empty::<&str>());
    T::from_arg_matches(&matches).expect("no option is required: a test makes both")
}

fn what_next(file: &DevFile) {
    // The program as it was called: `cargo run` puts nothing on the search path.
    let oncegate = env::args().next().unwrap_or_else(|| "oncegate".into());
    let (gateway, sidecar) = (file.gateway.as_deref().unwrap_or_default(), file.sidecar.as_deref().unwrap_or_default());
    output::line(format_args!(
        "\nTry next, in another terminal and this directory:\n\
         \x20 {oncegate} simulate stripe --duplicates 5\n\
         \x20 {oncegate} simulate stripe --duplicates 63 --concurrent\n\
         \x20 {oncegate} simulate paypal --bad-signature\n\
         \x20 {oncegate} stats --sidecar {sidecar} --watch\n\
         \x20 {oncegate} history --sidecar {sidecar}\n\
         \x20 {oncegate} health --sidecar {sidecar} --gateway {gateway}\n\
         \x20 {oncegate} cleanup --sidecar {sidecar} --days 30 --dry-run\n\
         \nServing until Ctrl-C. What reaches the application:"
    ));
}

/// Shows deliveries until a signal comes, or the services end by themselves.
async fn serve(
    deliveries: &mut mpsc::UnboundedReceiver<Delivery>,
    signal: &CancellationToken,
    services: &tokio::task::JoinHandle<Result<()>>,
) {
    let mut check = tokio::time::interval(std::time::Duration::from_secs(1));
    loop {
        tokio::select! {
            () = signal.cancelled() => return,
            _ = check.tick() => if services.is_finished() { return },
            delivery = deliveries.recv() => match delivery {
                Some(delivery) => output::line(format_args!(
                    "delivered  {}  {}  {}  attempt {}  fencing token {}",
                    delivery.provider,
                    delivery.event_id,
                    delivery.event_type,
                    delivery.attempt,
                    delivery.fencing_token,
                )),
                None => return,
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::{Args as _, FromArgMatches as _};

    use super::*;

    #[test]
    fn nobody_else_looks_into_the_directory_with_the_secret() {
        let directory = private_directory().unwrap();
        assert_eq!(directory.path().metadata().unwrap().permissions().mode() & 0o777, 0o700);
    }

    #[test]
    fn a_listener_that_is_open_to_other_machines_is_refused_by_its_name() {
        let refused = |listen: &[&str]| {
            let command =
                Dev::augment_args(clap::Command::new("dev")).mut_args(|argument| argument.env(Resettable::Reset));
            let matches = command.get_matches_from([&["dev"], listen].concat());
            Dev::from_arg_matches(&matches).unwrap().open_listeners().map(|problems| problems.to_string())
        };
        assert_eq!(refused(&[]), None);
        assert_eq!(refused(&["--gateway-listen", "[::1]:0", "--sidecar-listen", "127.0.0.2:0"]), None);
        let both = refused(&["--gateway-listen", "0.0.0.0:8080", "--application-listen", "192.0.2.1:1"]).unwrap();
        for setting in ["GATEWAY_LISTEN: 0.0.0.0:8080", "APPLICATION_LISTEN: 192.0.2.1:1"] {
            assert!(both.contains(setting), "{both}");
        }
        assert!(!both.contains("SIDECAR_LISTEN"), "{both}");
    }

    #[test]
    fn the_defaults_of_both_services_can_be_made() {
        let _: oncegate_sidecar::config::Options = defaults();
        let _: oncegate_gateway::config::Options = defaults();
    }
}
