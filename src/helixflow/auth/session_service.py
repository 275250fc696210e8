"""SessionService of proto/helixflow/auth/v1, put together from its parts."""

from collections.abc import Mapping

from helixflow.auth.dispatch import Conversation, Operation
from helixflow.auth.lockout import Lockout
from helixflow.auth.login import Login
from helixflow.auth.mfa import Mfa
from helixflow.auth.own_account import OwnPassword, end_own_session, get_self, list_own_sessions
from helixflow.auth.passwords import Passwords
from helixflow.auth.proof import PasswordProof
from helixflow.auth.redeem import Redeem
from helixflow.auth.refresh import Refresh
from helixflow.auth.sealing import Sealer
from helixflow.auth.second_factor import SecondFactor
from helixflow.auth.sign_in import SignIn
from helixflow.auth.signing_key_rotation import SigningKeyRotation
from helixflow.auth.signing_keys import SigningKeys
from helixflow.auth.tokens import AccessTokens


def session_operations(
    passwords: Passwords, sealer: Sealer, keys: SigningKeys, tokens: AccessTokens
) -> Mapping[str, Operation | Conversation]:
    """All of SessionService."""
    lockout = Lockout(sealer)
    proof = PasswordProof(passwords, lockout)
    second_factor = SecondFactor(sealer)
    sign_in = SignIn(tokens)
    login = Login(passwords, proof, lockout, second_factor, keys, sign_in)
    refresh = Refresh(sign_in)
    mfa = Mfa(proof, lockout, second_factor)
    return {
        "Login": login.login,
        "VerifyMfa": login.verify_mfa,
        "Refresh": refresh.refresh,
        "Logout": refresh.logout,
        "RedeemToken": Redeem(passwords, proof, lockout).redeem,
        "GetSelf": Operation(get_self),
        "ChangePassword": OwnPassword(passwords, proof).change,
        "EnrolMfa": mfa.enrol,
        "ConfirmMfa": mfa.confirm,
        "RenewRecoveryCodes": mfa.renew_recovery_codes,
        "DisableMfa": mfa.disable,
        "ListOwnSessions": Operation(list_own_sessions),
        "EndOwnSession": Operation(end_own_session),
    }


def signing_key_operations(rotation: SigningKeyRotation) -> Mapping[str, Operation]:
    """What AdminService does with signing keys."""
    return {"RotateSigningKey": Operation(rotation.rotate, prepare=rotation.prepare)}
