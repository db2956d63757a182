//! `oncegate resolve`.

use clap::builder::NonEmptyStringValueParser;
use oncegate_api::v1::{EventKey, ResolveRequest, State};
use oncegate_runtime::config::Problem;

use crate::{
    failure::Failure,
    history::{self, client},
    message, output,
    sidecar_client::Sidecar,
};

/// Decide by hand on an event that nobody may process
///
/// Shows the event, asks, and has it tried again (pending), taken for done (completed), or buried (dead). An event that
/// is unknown, dead, failed or pending can be decided on; one that is completed only with --force, and only to try it
/// again; one that is being processed never, while its lock lasts. Who decided, and why, is kept in its history.
///
/// The decision is made on the event as it is shown: if it has changed by the time of the answer, it is refused.
#[derive(clap::Args, Debug)]
#[command(after_long_help = "\
Examples:
  oncegate resolve stripe evt_123 --to completed --reason 'the ledger has it, see ticket 4711'
  oncegate resolve stripe evt_123 --to pending --reason 'the application is mended' --yes
  oncegate resolve stripe evt_123 --to pending --force --reason 'replay asked for by finance' --actor jane")]
pub(crate) struct Resolve {
    /// Who sent the event
    #[arg(value_name = "PROVIDER")]
    provider: String,

    /// The provider's identifier of the event
    #[arg(value_name = "EVENT_ID")]
    event_id: String,

    /// The tenant of the event
    #[arg(long, default_value = "default", value_name = "NAME")]
    tenant: String,

    /// What becomes of it: pending, it may be tried again; completed, it did take effect; dead, it never will
    #[arg(long, value_enum, value_name = "STATE")]
    to: Decided,

    /// Why, for those who read the history later
    #[arg(long, value_name = "TEXT", value_parser = NonEmptyStringValueParser::new())]
    reason: String,

    /// Who decides [default: the user of the operating system]
    #[arg(long, value_name = "NAME", value_parser = NonEmptyStringValueParser::new())]
    actor: Option<String>,

    /// The fencing token of the event that the decision is made on; 0 is any [default: that of the event shown]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(i64).range(0..))]
    token: Option<i64>,

    /// Also if it is completed: it is processed a second time
    #[arg(long)]
    force: bool,

    /// Do not ask. Needed where there is no terminal to ask on
    #[arg(long, short)]
    yes: bool,

    #[command(flatten)]
    sidecar: Sidecar,

    /// Show the event afterwards as JSON
    #[arg(long)]
    json: bool,
}

/// What can be decided.
#[derive(clap::ValueEnum, Clone, Copy, Debug)]
#[value(rename_all = "lower")]
enum Decided {
    Pending,
    Completed,
    Dead,
}

impl From<Decided> for State {
    fn from(decided: Decided) -> Self {
        match decided {
            Decided::Pending => Self::Pending,
            Decided::Completed => Self::Completed,
            Decided::Dead => Self::Dead,
        }
    }
}

impl Resolve {
    pub(crate) async fn run(self) -> Result<(), Failure> {
        if !self.yes && !output::can_ask() {
            return Err(Problem::new("--yes", "needed where there is no terminal to ask on").into());
        }
        let actor = match &self.actor {
            Some(actor) => actor.clone(),
            None => whoami::username()
                .ok()
                .filter(|name| !name.is_empty())
                .ok_or_else(|| Problem::new("--actor", "needed: the operating system does not say who you are"))?,
        };
        let mut client = client(self.sidecar.connect().await?);
        let key =
            EventKey { tenant: self.tenant.clone(), provider: self.provider.clone(), event_id: self.event_id.clone() };
        let history = history::find(&mut client, &self.sidecar, key.clone()).await?;
        let event = history.event.clone().unwrap_or_default();
        // Shown beside the result, so that it is visible even if the result goes into a pipe.
        output::notice(history::whole(&history));
        output::notice("");
        let to = State::from(self.to);
        let question = format!("From {} to {}, decided by {actor}?", message::state(event.state()), message::state(to));
        if !self.yes && !output::ask(question) {
            output::notice("nothing was changed");
            return Err(Failure::NotAsItShouldBe);
        }
        let request = ResolveRequest {
            key: Some(key),
            fencing_token: self.token.unwrap_or(event.fencing_token),
            to: to.into(),
            force: self.force,
            reason: self.reason.clone(),
            actor,
            result: None,
        };
        let response = client.resolve(request).await.map_err(|status| self.sidecar.failure(&status))?.into_inner();
        let resolved = response.event.unwrap_or_default();
        if self.json {
            output::json(&message::Event::from(&resolved));
        } else {
            output::line(format_args!(
                "{} {} is {} now, with fencing token {}",
                self.provider,
                self.event_id,
                message::state(resolved.state()),
                resolved.fencing_token,
            ));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;

    #[derive(clap::Parser)]
    struct Command {
        #[command(flatten)]
        resolve: Resolve,
    }

    #[test]
    fn a_decision_has_a_state_and_a_reason() {
        let parse = |arguments: &[&str]| {
            Command::try_parse_from([&["resolve", "stripe", "evt_1"], arguments].concat()).map(|of| of.resolve)
        };
        let resolve = parse(&["--to", "dead", "--reason", "refunded"]).unwrap();
        assert_eq!((State::from(resolve.to), resolve.token), (State::Dead, None));
        for wrong in [
            &["--to", "dead"][..],
            &["--reason", "x"],
            &["--to", "dead", "--reason", ""],
            &["--to", "processing", "--reason", "x"],
            &["--to", "dead", "--reason", "x", "--token", "-1"],
        ] {
            assert!(parse(wrong).is_err(), "{wrong:?}");
        }
    }
}
